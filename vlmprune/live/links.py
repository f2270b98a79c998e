"""Whether a model still is what hooks were put on: after wrapping, parts can be replaced, and attention can be led past us."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from vlmprune.errors import UsageError
from vlmprune.live.attention import ATTENTION_KEY


@dataclass(frozen=True, eq=False)
class Link:
    """A module in its place. `path`: from the base model to it."""

    parent: nn.Module
    name: str
    child: nn.Module
    path: str

    @property
    def holds(self) -> bool:
        """It is there, or inside of what took its place (a compiled module, a shell)."""
        there = self.parent._modules.get(self.name)
        return there is self.child or (there is not None and any(module is self.child for module in there.modules()))


class Links:
    """The places of all modules that a plan acts in.

    Args:
        base: the base model.
        language_model: its language model.
        modules: what carries hooks.
        routed: attention modules that are led through ours.
        recipe: for sentences.

    Attributes:
        way: of every module on the way to the language model, where it is: among its parent's modules, and by which name.
    """

    def __init__(
        self,
        base: nn.Module,
        language_model: nn.Module,
        modules: Iterable[nn.Module],
        routed: Iterable[nn.Module],
        recipe: object,
    ) -> None:
        self._recipe = recipe
        paths = {module: path for path, module in base.named_modules()}
        self._routed = {module: paths[module] for module in routed if module in paths}
        found = [_chain(base, paths[module]) for module in (language_model, *modules, *self._routed) if module in paths]
        self._links = {link.path: link for links in found for link in links}
        self._to_language_model = found[0] if found else []
        self.way = tuple((link.parent._modules, link.name, link.child) for link in self._to_language_model)

    def check(self, whole: bool) -> None:
        """Refuse to go on past a part that was replaced; the way to the language model alone, if not `whole`.

        Raises:
            UsageError: a hooked module is not in its place, or a module's own config leads past our attention.
        """
        for link in self._links.values() if whole else self._to_language_model:
            if link.parent._modules.get(link.name) is not link.child and not link.holds:
                raise UsageError(
                    f"{link.path} was replaced after vlmprune.wrap, and {self._recipe} does not reach what is there now: call "
                    "vlmprune.unwrap(model), and wrap the model again."
                )
        if whole:
            check_routes(self._routed, self._recipe)


def check_routes(routed: Mapping[nn.Module, str], recipe: object) -> None:
    """Refuse attention that does not come through ours any more. `routed`: attention modules and their paths.

    Raises:
        UsageError: the implementation was set in a module's own config.
    """
    for module, path in routed.items():
        config = module.config
        if (found := config._attn_implementation_internal) != ATTENTION_KEY:  # type: ignore[union-attr]
            raise UsageError(
                f"the attention implementation of {path} was set to {found!r} in its own config after vlmprune.wrap, so "
                f"that {recipe} has no effect there: call vlmprune.unwrap(model), then "
                f"model.set_attn_implementation({found!r}), which sets it for all layers, and wrap the model again."
            )


def _chain(base: nn.Module, path: str) -> list[Link]:
    links, parent, names = [], base, path.split(".") if path else []
    for depth, name in enumerate(names):
        child = parent.get_submodule(name)
        links.append(Link(parent, name, child, ".".join(names[: depth + 1])))
        parent = child
    return links

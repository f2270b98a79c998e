"""Everything of a model that a hook library could touch."""

from __future__ import annotations

from torch.nn.modules import module as torch_module
from transformers import cache_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Snapshot:
    """Everything reachable from a model that a hook library could touch, by identity.

    Holds references to the objects, so that their ids cannot be reused.  `rope_deltas` is left out: Qwen's own
    forward writes it.  Transformers' registries may gain vlmprune's own key, but nothing else.
    """

    def __init__(self, model):
        self.seen: dict[str, dict] = {}
        classes = {cache_utils.DynamicCache, cache_utils.DynamicLayer, cache_utils.StaticLayer}
        for name, module in model.named_modules():
            self.seen[f"{name}.class"] = {"class": type(module)}
            self._add(f"module {name}", vars(module))
            classes.update(type(module).__mro__)
            config = getattr(module, "config", None)
            if config is not None:
                self._add(f"config of {name}", vars(config))
        for cls in classes - {object}:
            self._add(f"class {cls.__qualname__}", dict(vars(cls)), deep=False)
        self._add("generation config", vars(model.generation_config))
        self._add("torch", {name: value for name, value in vars(torch_module).items() if name.startswith("_global")})
        for name, registry in (("attention", ALL_ATTENTION_FUNCTIONS), ("mask", ALL_MASK_ATTENTION_FUNCTIONS)):
            known = {key: value for key, value in registry._global_mapping.items() if not key.startswith("vlmprune")}
            self._add(f"{name} registry", known)
            self._add(f"{name} registry, local", dict(registry._local_mapping))

    def _add(self, name: str, values: dict, deep: bool = True) -> None:
        values = {key: value for key, value in values.items() if key != "rope_deltas"}
        self.seen[name] = dict(values)
        for key, value in values.items():
            if deep and isinstance(value, dict):  # hooks, parameters, buffers, children
                self.seen[f"{name}.{key}"] = dict(value)

    def differences(self, other: Snapshot) -> list[str]:
        found = [f"{name} only once" for name in self.seen.keys() ^ other.seen.keys()]
        for name in self.seen.keys() & other.seen.keys():
            mine, theirs = self.seen[name], other.seen[name]
            if list(mine) != list(theirs):
                found.append(f"{name}: {sorted(map(str, mine.keys() ^ theirs.keys())) or 'another order'}")
                continue
            for key, value in mine.items():
                plain = isinstance(value, bool | int | float | str | list | tuple | type(None))
                if value is not theirs[key] and not (plain and value == theirs[key]):
                    found.append(f"{name}[{key!r}]")
        return found

"""`wrap`, `unwrap`, and `Run`, the handle of a wrapped model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload
from weakref import ReferenceType, ref

from torch import nn

from vlmprune.adapters.registry import image_tower_of
from vlmprune.errors import UsageError
from vlmprune.live.attachment import Attachment, attachment_of, check_unshared
from vlmprune.live.context import truth
from vlmprune.live.explain import Explanation, explain, not_asked
from vlmprune.live.handle_base import Handle
from vlmprune.live.image_tower_run import TowerRun, wrapped_tower_in
from vlmprune.live.merged import read_positions
from vlmprune.live.owner import Owner
from vlmprune.live.plan import Plan
from vlmprune.live.prefix import Prefix, encode
from vlmprune.live.record import Prefill
from vlmprune.live.report import Report, no_prefill
from vlmprune.live.shells import model_inside, without_shells
from vlmprune.methods import Pruner, Redistributor
from vlmprune.recipe import Recipe
from vlmprune.schedule import Budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@overload
def wrap(
    model: PreTrainedModel, *methods: Recipe | Pruner | Redistributor | str, explain: bool = False, family: str | None = None
) -> Run: ...
@overload
def wrap(
    model: nn.Module, *methods: Recipe | Pruner | Redistributor | str, explain: bool = False, family: str | None = None
) -> Run | TowerRun: ...
def wrap(
    model: nn.Module, *methods: Recipe | Pruner | Redistributor | str, explain: bool = False, family: str | None = None
) -> Run | TowerRun:
    """Apply a recipe to a loaded model: prune visual tokens, and redistribute attention.

    The model is changed in place, by hooks, and can be restored. It is a Hugging Face vision-language model, or an image tower
    without a language model: a model of open_clip, CLIP, SigLIP, or a ViT of timm (docs/image_towers.md).

    Args:
        model: a model of a supported family, of any weights, dtype and device. It keeps its class and its API. It may be inside
            PEFT, DDP, FSDP, `torch.compile` and the like: calls through them are pruned.
        methods: methods, recipes, or recipe strings (`"fastv:layer=2,fraction=0.25"`).
        explain: keep the scores by which stages decide, for `run.explain(…)`. A method that ranks tokens computes them once
            more for that.
        family: "auto" looks at a model of an unknown family, refuses what might be silently wrong, and allows methods that
            look at nothing but features (`print(run.found)` shows what was found); or the name of a supported family, as which
            a model of an unknown type is treated. By default, the model's own type decides.

    Returns:
        The handle, for an image tower a `TowerRun`. Its `remove()`, or leaving a `with` block, restores the model bit for bit.
        Wrapping a model again replaces the recipe, also while other threads generate: a conversation goes on under the recipe
        it began with, and a new one follows the new recipe.

    Raises:
        UsageError: no model, an unsupported model, a family that does not fit, an unknown method, a layer that the model does
            not have, methods that exclude each other, or an `explain` that is no bool. All of this is checked here, before the
            first token.
    """
    recipe, inside = Recipe.of(*methods), without_shells(model)
    if (tower := image_tower_of(inside)) is None:
        return Run(model, recipe, explain, family)
    if truth("explain", explain) or family is not None:
        option = "explain=True" if explain else f"family={family!r}"
        raise UsageError(f"{option} is of vision-language models, and {tower.name} has no language model: leave it out.")
    return TowerRun(inside, tower, recipe)


def unwrap(model: nn.Module) -> nn.Module:
    """Restore a model, whoever holds its handle, and return it. A model that is not wrapped stays as it is."""
    inside = without_shells(model)
    if (tower := wrapped_tower_in(inside)) is not None:
        tower.remove()
        return model
    inside = inside if image_tower_of(inside) else model_inside(model)
    found = attachment_of(getattr(inside, "base_model", inside))
    if found is not None:
        found.clear()
    return model


class Run(Handle):
    """The handle of a wrapped model, similar to torch's `RemovableHandle`.

    Settings (`enabled`, `override`) and records (`last`, `report`, `explain`) belong to the caller: a thread, or an asyncio
    task. `vlmprune.live.context` has the rule.

    Attributes:
        model: the wrapped model itself, without PEFT, DDP and the like.
        recipe: the recipe that is applied.
        found: what was found in a model of an unknown family under `family="auto"`; None otherwise. `print` shows it.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, explain: bool = False, family: str | None = None) -> None:
        super().__init__(model_inside(model), recipe)
        self._explains = truth("explain", explain)
        plan = Plan(self.model, recipe, self._contexts, family)  # refuses what cannot work
        self.found = plan.found
        plan.pruning.explains = self._explains
        check_unshared(plan)
        if wrapped_tower_in(plan.base) is not None:
            raise UsageError("the vision tower of this model is wrapped by itself already: call vlmprune.unwrap on it first.")
        # from here on the model changes
        self._plan: Plan | None = plan
        self._attachment: Attachment = attachment_of(plan.base, make=True)  # type: ignore[assignment]
        self._owner: ReferenceType[Owner] = ref(self._attachment.follow(plan))

    def __repr__(self) -> str:
        current = self._attachment.current
        return self._shown(type(self.model).__name__, self._plan is None or current is None, current is self._owner())

    def remove(self) -> None:
        """Restore the model. Conversations whose cache was pruned cannot go on: their next step is refused.

        A second call does nothing. Neither does a call after the model was wrapped again; conversations that began under this
        handle then go on.

        Raises:
            UsageError: another thread is inside a forward pass that does not end within a minute. New prompts run un-pruned
                from then on; call `remove()` again.
        """
        self._plan = None
        self._contexts.close()
        if self._attachment.current in (None, self._owner()):
            self._attachment.clear()

    @contextmanager
    def override(
        self,
        *,
        tokens: int | None = None,
        fraction: float | None = None,
        enabled: bool | None = None,
        image_positions: Any = None,
    ) -> Iterator[Run]:
        """Another budget, no pruning, or the places of pictures, inside a `with` block: for the caller's calls, and for threads
        started in the block.

        Calls in the block follow this handle's recipe, even if the model is wrapped again meanwhile. Inside the block, `last`
        and `report()` are about the block's calls only.

        Args:
            tokens, fraction: what to keep of each picture, instead of the recipe's budget.
            enabled: False runs prompts un-pruned.
            image_positions: for prompts whose `inputs_embeds` holds their pictures already: `[batch, token]`, true at the
                tokens of pictures, where every run of true is a picture; or the number of each token's picture in its row, from
                1, and 0 for words.

        Raises:
            UsageError: the recipe has several stages, and one number cannot be meant for all; the budget is out of range;
                `enabled` is neither True nor False; `image_positions` says no places; or the handle was removed.
        """
        enabled = None if enabled is None else truth("enabled", enabled)
        image_positions = None if image_positions is None else read_positions(image_positions)
        plan = self._plan
        if plan is None or self._attachment.current is None:
            raise UsageError(
                f"this handle of {self.recipe} was removed from the model and overrides nothing: wrap the model again, and use "
                "the handle that wrap(…) returns."
            )
        budget = None if tokens is None and fraction is None else self._budget(plan, tokens, fraction)
        owner = self._owner()
        if owner is None or owner.plan is None:  # replaced meanwhile, and no conversation is left
            owner = self._attachment.join(plan)
            self._owner = ref(owner)
        with self._attachment.awake(), self._contexts.block(owner, enabled, budget, image_positions):
            yield self

    def encode(self, **inputs: Any) -> Prefix:
        """Prune a picture once, to ask many questions about it: run the beginning of a prompt, up to the question.

        `model.generate(**prefix.ask(**tokenized_questions))` answers them, in a batch or one by one, exactly as if each whole
        prompt were run by itself; `random` draws once for the prefix, instead of once for every question. `run.last` is the
        record of the beginning. The caller's settings count (`override`).

        Args:
            inputs: of one prompt, as the processor gives them: ids, mask, pixels and what belongs to these.

        Returns:
            The prefix. It can be used as long as the recipe is attached.

        Raises:
            UsageError: a method of the recipe looks at the question, edits attention, or removes tokens from the cache after
                prefill; in this family the picture is computed with the question; several prompts, or none with a picture; or
                the handle was removed.
        """
        with self.override():
            assert self._plan is not None
            return encode(self._plan, inputs)

    def _budget(self, plan: Plan, tokens: int | None, fraction: float | None) -> Budget:
        stages = [bound for bound in plan.pruning.stages if plan.pruning.may_override(bound)]
        stage, budget = self._only_stage(stages), Budget(tokens, fraction)
        replace(stage, budget=budget)  # refuses what the stage would refuse
        return budget

    @property
    def last(self) -> Prefill | None:
        """The record of the caller's last prompt, or None if there was none: inside an `override` block that of the block,
        elsewhere that of this thread."""
        return self._contexts.last

    def report(self) -> Report:
        """Numbers of the caller's last prompt: tokens kept, FLOPs, bytes and times. `print` shows them as a table.

        Raises:
            UsageError: the caller ran no prompt.
        """
        if (record := self.last) is None:
            raise no_prefill()
        return Report.of(record, str(self.recipe))

    def explain(self, token: int, image: int = 0, sample: int = 0) -> Explanation:
        """Why one visual token was dropped or kept in the caller's last prompt: stage by stage the method, the token's score
        and rank, and the last score that was kept. `print` shows it in sentences.

        Args:
            token: index of the token in its picture, from 0, in raster order; LLaVA-NeXT's row separators do not count.
            image: number of the picture in its sample, from 0.
            sample: row of the batch, from 0.

        Raises:
            UsageError: the model was not wrapped with `explain=True`, the caller ran no prompt, the recipe drops nothing, or
                there is no such token.
        """
        if not self._explains:
            raise not_asked()
        if (record := self.last) is None:
            raise no_prefill()
        return explain(record, token, image, sample)

"""Every model family of this library, tiny: a random model of the stock class, and inputs for it.

The weights are drawn with standard deviation 0.25, so that attention is peaked and every token matters: a token too many or too
few, or at a wrong position, changes the logits (standard deviation 1) by a few tenths; rounding changes them by 2e-5 at most.
What a fresh stock model sets to a constant (norms, biases, scales) stays around this constant, whatever it is: norms that
multiply by 1 + w are centred at 0 then, and others at 1.

The pictures of odd number are larger than those of even number wherever the family allows it: batches are really ragged. So are
videos, and those of odd number have a frame more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from families import configs
from families.configs import (
    BREAK,
    END,
    FAKE,
    FIRST_WORD,
    IMAGE,
    LAYERS,
    MERGE,
    MERGED,
    NEXT_SIDE,
    PAD,
    PATCH,
    PINPOINTS,
    POOLED_PINPOINTS,
    POOLED_SIDE,
    ROW,
    SIDE,
    SIZES,
    START,
    TIME,
    VIDEO,
    VOCAB,
)
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

DEVIATION = 0.25
SUPPRESS = list(range(FIRST_WORD))
"""Tokens that a random model must not emit: a generated image token would ask for pixels."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Picture:
    """One random picture: its tokens in the prompt, and what the model is given of it."""

    ids: list[int]
    tensors: Tensors


# -- pictures ----------------------------------------------------------------------------------------------------------------


def _pixels(random: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=random)


def _packed(random: torch.Generator, number: int) -> Picture:
    """Patches in one sequence; 2×2 of them become one token (Qwen, GLM)."""
    rows, columns = MERGED[number % 2]
    grid = [1, rows * MERGE, columns * MERGE]
    values = _pixels(random, grid[1] * grid[2], 3 * TIME * PATCH**2)
    ids = [START, *[IMAGE] * (rows * columns), END]
    return Picture(ids, {"pixel_values": values, "image_grid_thw": torch.tensor([grid])})


def _video_llama(random: torch.Generator, number: int) -> Picture:
    rows, columns = MERGED[number % 2]
    grid = [1, rows * MERGE, columns * MERGE]
    tensors = {
        "pixel_values": _pixels(random, grid[1] * grid[2], 3 * PATCH**2),
        "image_grid_thw": torch.tensor([grid]),
        "image_merge_sizes": torch.tensor([MERGE]),
    }
    return Picture([IMAGE] * (rows * columns), tensors)


def _tiles(number: int) -> int:
    return 1 + number % 2


def _tile_run(tokens: int, side: int, before: tuple[int, ...] = (START,), after: tuple[int, ...] = (END,)) -> Any:
    """One or two tiles; all their tokens in one run of the prompt (InternVL, Cohere2 Vision)."""

    def make(random: torch.Generator, number: int) -> Picture:
        count = _tiles(number)
        values = _pixels(random, count, 3, side * PATCH, side * PATCH)
        return Picture([*before, *[IMAGE] * (tokens * count), *after], {"pixel_values": values})

    return make


def _one_raster(tokens: int, side: int, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> Any:
    """One tile, always (PaliGemma, Janus, DeepSeek-VL, FastVLM, Gemma 3 without pan and scan)."""

    def make(random: torch.Generator, number: int) -> Picture:
        values = _pixels(random, 1, 3, side * PATCH, side * PATCH)
        return Picture([*before, *[IMAGE] * tokens, *after], {"pixel_values": values})

    return make


def _two_towers(random: torch.Generator, number: int) -> Picture:
    """The same picture in two sizes (DeepSeek-VL's hybrid)."""
    picture = _one_raster(NEXT_SIDE**2, NEXT_SIDE)(random, number)
    return Picture(picture.ids, {**picture.tensors, "high_res_pixel_values": _pixels(random, 1, 3, configs.HIGH, configs.HIGH)})


def _aya(random: torch.Generator, number: int) -> Picture:
    """Each tile has its own run, with a marker before it."""
    count, tokens = _tiles(number), (SIDE // 2) ** 2
    ids = [START, *(token for _ in range(count) for token in (BREAK, *[IMAGE] * tokens)), END]
    return Picture(ids, {"pixel_values": _pixels(random, count, 3, SIDE * PATCH, SIDE * PATCH)})


def _gemma3(random: torch.Generator, number: int) -> Picture:
    """Odd pictures with one pan-and-scan crop beside the whole; both have a run of their own, as the processor writes them."""
    count = _tiles(number)
    ids = [token for _ in range(count) for token in (START, *[IMAGE] * 9, END)]
    return Picture(ids, {"pixel_values": _pixels(random, count, 3, SIDE * PATCH, SIDE * PATCH)})


def _gemma4(random: torch.Generator, number: int) -> Picture:
    """Patches with their cells; every picture is padded to as many as the largest has."""
    rows, columns = MERGED[number % 2]
    most = max(r * c for r, c in MERGED) * MERGE**2
    cells = torch.cartesian_prod(torch.arange(rows * MERGE), torch.arange(columns * MERGE)).flip(1)  # (x, y), row by row
    values, positions = torch.zeros(1, most, 3 * PATCH**2), torch.full((1, most, 2), -1)
    values[0, : len(cells)] = _pixels(random, len(cells), 3 * PATCH**2)
    positions[0, : len(cells)] = cells
    return Picture([START, *[IMAGE] * (rows * columns), END], {"pixel_values": values, "image_position_ids": positions})


def _crops(patches: int = NEXT_SIDE, pinpoints: list[list[int]] = PINPOINTS) -> Any:
    """An overview and crops, with a row separator behind every row (LLaVA-NeXT, LLaVA-OneVision)."""

    def make(random: torch.Generator, number: int) -> Picture:
        size, side = SIZES[number % 2], patches * PATCH
        crops = image_size_to_num_patches(size, pinpoints, side)
        most = max(image_size_to_num_patches(size, pinpoints, side) for size in SIZES)
        values = torch.zeros(1, most, 3, side, side)
        values[0, :crops] = _pixels(random, crops, 3, side, side)
        down, across = get_anyres_image_grid_shape(size, pinpoints, side)
        rows, columns = unpad_image(torch.empty(1, down * patches, across * patches), size).shape[1:]
        tokens = patches**2 + rows * (columns + 1)
        return Picture([IMAGE] * tokens, {"pixel_values": values, "image_sizes": torch.tensor([size])})

    return make


def _idefics(random: torch.Generator, number: int) -> Picture:
    """Tiles with markers between their runs, and the whole picture last."""
    count, tokens = 1 + 2 * (number % 2), (SIDE // 2) ** 2
    tiles = [token for _ in range(count - 1) for token in (FAKE, ROW, *[IMAGE] * tokens)]
    ids = [*tiles, *([BREAK] if tiles else []), FAKE, START, *[IMAGE] * tokens, FAKE]
    return Picture(ids, {"pixel_values": _pixels(random, count, 3, SIDE * PATCH, SIDE * PATCH)})


def _pixtral(random: torch.Generator, number: int) -> Picture:
    """Pictures of any size, padded to the largest; text tokens behind every row."""
    rows, columns = MERGED[number % 2]
    most = max(max(r, c) for r, c in MERGED) * MERGE * PATCH
    height, width = rows * MERGE * PATCH, columns * MERGE * PATCH
    values = torch.zeros(1, 3, most, most)
    values[0, :, :height, :width] = _pixels(random, 3, height, width)
    ids = [token for _ in range(rows) for token in (*[IMAGE] * columns, BREAK)]
    return Picture([*ids[:-1], END], {"pixel_values": values, "image_sizes": torch.tensor([[height, width]])})


def _naflex(random: torch.Generator, number: int) -> Picture:
    rows, columns = (side * 2 for side in MERGED[number % 2])
    most = max(r * c for r, c in MERGED) * 4
    values, mask = torch.zeros(1, most, 3 * PATCH**2), torch.zeros(1, most, dtype=torch.long)
    values[0, : rows * columns] = _pixels(random, rows * columns, 3 * PATCH**2)
    mask[0, : rows * columns] = 1
    tensors = {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[rows, columns]])}
    return Picture([START, *[IMAGE] * (rows * columns // 4), END], tensors)


def _ovis(random: torch.Generator, number: int) -> Picture:
    """Indicator tokens around and between the tiles; the model replaces their embeddings, too."""
    count, tokens = _tiles(number), (SIDE // 2) ** 2
    ids = [START, *[IMAGE] * tokens, END]
    ids += [token for _ in range(count - 1) for token in (*[IMAGE] * tokens, BREAK)] + [ROW]
    return Picture(ids, {"pixel_values": _pixels(random, count, 3, SIDE * PATCH, SIDE * PATCH)})


def _perception(random: torch.Generator, number: int) -> Picture:
    """[picture, tile, 3, height, width]: pictures of one batch have the same number of tiles."""
    values = _pixels(random, 1, 2, 3, SIDE * PATCH, SIDE * PATCH)
    return Picture([IMAGE] * (2 * (SIDE // 2) ** 2), {"pixel_values": values})


# -- videos ------------------------------------------------------------------------------------------------------------------

FRAMES = ((2, 2, 2), (3, 2, 3))
"""(frames, rows, columns) of tokens of even and odd videos of any resolution."""
ALL_FRAMES = 3
"""Frames of every video where videos of one batch have the same number."""


def _packed_video(apart: bool, timed: bool = False) -> Any:
    """Patches in one sequence; all frames in one run, or each in one of its own with its time before it (Qwen)."""

    def make(random: torch.Generator, number: int) -> Picture:
        frames, rows, columns = FRAMES[number % 2]
        grid = [frames, rows * MERGE, columns * MERGE]
        ids = [START, *[VIDEO] * (frames * rows * columns), END]
        if apart:
            ids = [token for f in range(frames) for token in (FIRST_WORD + f, START, *[VIDEO] * (rows * columns), END)]
        values = _pixels(random, frames * grid[1] * grid[2], 3 * TIME * PATCH**2)
        tensors = {"pixel_values_videos": values, "video_grid_thw": torch.tensor([grid])}
        return Picture(ids, {**tensors, "second_per_grid_ts": torch.tensor([0.5 + number % 2 / 4])} if timed else tensors)

    return make


def _glm_video(random: torch.Generator, number: int) -> Picture:
    """Frames in the placeholder of pictures, each with its time behind it, between two marks."""
    video = _packed_video(False)(random, number)
    frames, rows, columns = FRAMES[number % 2]
    ids = [token for f in range(frames) for token in (START, *[IMAGE] * (rows * columns), END, FIRST_WORD + f)]
    return Picture([BREAK, *ids, FAKE], video.tensors)


def _gemma4_video(random: torch.Generator, number: int) -> Picture:
    """The frames of all videos follow each other."""
    frames, rows, columns = FRAMES[number % 2]
    most = max(r * c for _, r, c in FRAMES) * MERGE**2
    cells = torch.cartesian_prod(torch.arange(rows * MERGE), torch.arange(columns * MERGE)).flip(1)
    values, positions = torch.zeros(frames, most, 3 * PATCH**2), torch.full((frames, most, 2), -1)
    values[:, : len(cells)] = _pixels(random, frames, len(cells), 3 * PATCH**2)
    positions[:, : len(cells)] = cells
    ids = [token for f in range(frames) for token in (FIRST_WORD + f, START, *[VIDEO] * (rows * columns), END)]
    tensors = {"pixel_values_videos": values, "video_position_ids": positions, "num_frames_per_video": torch.tensor([frames])}
    return Picture(ids, tensors)


def _video_llama_video(random: torch.Generator, number: int) -> Picture:
    frames, rows, columns = FRAMES[number % 2]
    grid = [frames, rows * MERGE, columns * MERGE]
    ids = [token for f in range(frames) for token in (FIRST_WORD + f, *[VIDEO] * (rows * columns))]
    tensors = {
        "pixel_values_videos": _pixels(random, frames * grid[1] * grid[2], 3 * PATCH**2),
        "video_grid_thw": torch.tensor([grid]),
        "video_merge_sizes": torch.tensor([MERGE]),
    }
    return Picture(ids, tensors)


def _frames(side: int, tokens: int, separators: int) -> Any:
    """Frames of one size, with `tokens` each, in one run (LLaVA-OneVision, LLaVA-NeXT-Video)."""

    def make(random: torch.Generator, number: int) -> Picture:
        values = _pixels(random, 1, ALL_FRAMES, 3, side * PATCH, side * PATCH)
        return Picture([VIDEO] * (ALL_FRAMES * tokens + separators), {"pixel_values_videos": values})

    return make


# -- what is beside the pixels -----------------------------------------------------------------------------------------------


def _by_row(pictures: list[list[Picture]], length: int) -> Tensors:
    """`[row, tile, …]`, rows with fewer tiles end in zeros (Idefics3, SmolVLM)."""
    tiles = [[tile for picture in row for tile in picture.tensors["pixel_values"]] for row in pictures]
    most = max(len(row) for row in tiles)
    if not most:
        return {}
    side = SIDE * PATCH
    values = torch.zeros(len(tiles), most, 3, side, side)
    for row, of_row in enumerate(tiles):
        for number, tile in enumerate(of_row):
            values[row, number] = tile
    return {"pixel_values": values}


def _joined(pictures: list[list[Picture]], length: int) -> Tensors:
    every = [picture.tensors for row in pictures for picture in row]
    names = dict.fromkeys(name for tensors in every for name in tensors)
    return {name: torch.cat([tensors[name] for tensors in every if name in tensors]) for name in names}


@dataclass(frozen=True)
class Tiny:
    """One family's tiny model.

    Attributes:
        model: its transformers class.
        config: makes its configuration.
        picture: makes picture `number`.
        video: makes video `number`; None where videos are not supported.
        collate: joins the pictures of all rows into arguments of a call.
        kinds: name of the argument `[batch, sequence]` that states which tokens are a picture's, or "".
        kind_of_image, kind_of_new: its value at placeholders of pictures and at generated tokens (2 at a video's, 0 elsewhere).
        pictures_first: prompts begin with their pictures.
        attentions: the attention implementations that run here; the first is what the model takes by itself.
        seed: of the weights. With some, rounding decides: between two experts or heads, or more than 5e-5 of what recurrent
            layers of the stock model compute in a batch and alone.
        recurrent: there are decoder layers without attention, for which *masked* is not defined.
        injected: into how many of the first decoder layers the tower's features are added again.
        window: tokens that its sliding layers see, 0 if there are none.
        blocks: tokens of a picture (or of the prompt) see each other in both directions.
    """

    model: type
    config: Callable[[], Any]
    picture: Callable[[torch.Generator, int], Picture]
    collate: Callable[[list[list[Picture]], int], Tensors] = _joined
    kinds: str = ""
    kind_of_image: int = 1
    kind_of_new: int = 0
    pictures_first: bool = False
    attentions: tuple[str, ...] = ("sdpa", "eager")
    seed: int = 0
    recurrent: bool = False
    injected: int = 0
    window: int = 0
    blocks: bool = False
    video: Callable[[torch.Generator, int], Picture] | None = None

    @property
    def plain(self) -> bool:
        """Whether masks are causal and the same in all layers, and nothing is injected."""
        return not any((self.window, self.blocks, self.injected))

    @property
    def model_type(self) -> str:
        return self.model.config_class.model_type


_QWEN = {"kinds": "mm_token_type_ids"}
_TILE = (SIDE // 2) ** 2

TINY = {
    "llava": Tiny(tf.LlavaForConditionalGeneration, configs.llava, _one_raster(NEXT_SIDE**2, NEXT_SIDE)),
    "llava_next": Tiny(tf.LlavaNextForConditionalGeneration, configs.llava_next, _crops()),
    "qwen2_vl": Tiny(tf.Qwen2VLForConditionalGeneration, configs.qwen2_vl, _packed, video=_packed_video(False), **_QWEN),
    "qwen2_5_vl": Tiny(
        tf.Qwen2_5_VLForConditionalGeneration, configs.qwen2_5_vl, _packed, video=_packed_video(False, timed=True), **_QWEN
    ),
    "qwen3_vl": Tiny(
        tf.Qwen3VLForConditionalGeneration, configs.qwen3_vl, _packed, injected=3, video=_packed_video(True), **_QWEN
    ),
    "qwen3_vl_moe": Tiny(
        tf.Qwen3VLMoeForConditionalGeneration, configs.qwen3_vl_moe, _packed, injected=3, video=_packed_video(True), **_QWEN
    ),
    "qwen3_5": Tiny(
        tf.Qwen3_5ForConditionalGeneration, configs.qwen3_5, _packed, recurrent=True, video=_packed_video(True), **_QWEN
    ),
    "qwen3_5_moe": Tiny(
        tf.Qwen3_5MoeForConditionalGeneration,
        configs.qwen3_5_moe,
        _packed,
        seed=1,
        recurrent=True,
        video=_packed_video(True),
        **_QWEN,
    ),
    "internvl": Tiny(tf.InternVLForConditionalGeneration, configs.internvl, _tile_run(_TILE, SIDE)),
    "gemma3": Tiny(
        tf.Gemma3ForConditionalGeneration,
        configs.gemma3,
        _gemma3,
        kinds="token_type_ids",
        window=configs.WINDOW,
        blocks=True,
    ),
    "gemma4": Tiny(
        tf.Gemma4ForConditionalGeneration,
        configs.gemma4,
        _gemma4,
        kinds="mm_token_type_ids",
        window=configs.WINDOW,
        blocks=True,
        video=_gemma4_video,
    ),
    "gemma4_moe": Tiny(
        tf.Gemma4ForConditionalGeneration,
        configs.gemma4_moe,
        _gemma4,
        kinds="mm_token_type_ids",
        window=configs.WINDOW,
        blocks=True,
        video=_gemma4_video,
    ),
    "gemma4_e": Tiny(
        tf.Gemma4ForConditionalGeneration,
        configs.gemma4_e,
        _gemma4,
        kinds="mm_token_type_ids",
        window=configs.WINDOW,
        video=_gemma4_video,
    ),
    "llava_onevision": Tiny(
        tf.LlavaOnevisionForConditionalGeneration, configs.llava_onevision, _crops(), video=_frames(NEXT_SIDE, 4, 1)
    ),
    "smolvlm": Tiny(tf.SmolVLMForConditionalGeneration, configs.smolvlm, _idefics, _by_row),
    "idefics3": Tiny(tf.Idefics3ForConditionalGeneration, configs.idefics3, _idefics, _by_row),
    "mistral3": Tiny(tf.Mistral3ForConditionalGeneration, configs.mistral3, _pixtral),
    "glm4v": Tiny(tf.Glm4vForConditionalGeneration, configs.glm4v, _packed, video=_glm_video, **_QWEN),
    "glm46v": Tiny(tf.Glm46VForConditionalGeneration, configs.glm46v, _packed, video=_glm_video, **_QWEN),
    "glm4v_moe": Tiny(tf.Glm4vMoeForConditionalGeneration, configs.glm4v_moe, _packed, seed=1, video=_glm_video, **_QWEN),
    "paligemma": Tiny(
        tf.PaliGemmaForConditionalGeneration,
        configs.paligemma,
        _one_raster(NEXT_SIDE**2, NEXT_SIDE),
        kinds="token_type_ids",
        kind_of_image=0,
        kind_of_new=1,
        pictures_first=True,
        blocks=True,
    ),
    "paligemma2": Tiny(
        tf.PaliGemmaForConditionalGeneration,
        configs.paligemma2,
        _one_raster(NEXT_SIDE**2, NEXT_SIDE),
        kinds="token_type_ids",
        kind_of_image=0,
        kind_of_new=1,
        pictures_first=True,
        attentions=("eager",),
        window=configs.WINDOW,
        blocks=True,
    ),
    "lfm2_vl": Tiny(tf.Lfm2VlForConditionalGeneration, configs.lfm2_vl, _naflex, recurrent=True),
    "aya_vision": Tiny(tf.AyaVisionForConditionalGeneration, configs.aya_vision, _aya, window=configs.WINDOW),
    "cohere2_vision": Tiny(
        tf.Cohere2VisionForConditionalGeneration, configs.cohere2_vision, _tile_run(_TILE, SIDE), window=configs.WINDOW
    ),
    "llava_next_video": Tiny(
        tf.LlavaNextVideoForConditionalGeneration,
        configs.llava_next_video,
        _crops(POOLED_SIDE, POOLED_PINPOINTS),
        video=_frames(POOLED_SIDE, 4, 0),
    ),
    "video_llama_3": Tiny(
        tf.VideoLlama3ForConditionalGeneration, configs.video_llama_3, _video_llama, video=_video_llama_video
    ),
    "perception_lm": Tiny(tf.PerceptionLMForConditionalGeneration, configs.perception_lm, _perception),
    "ovis2": Tiny(tf.Ovis2ForConditionalGeneration, configs.ovis2, _ovis),
    "fast_vlm": Tiny(tf.FastVlmForConditionalGeneration, configs.fast_vlm, _one_raster(NEXT_SIDE**2, NEXT_SIDE)),
    "janus": Tiny(tf.JanusForConditionalGeneration, configs.janus, _one_raster(NEXT_SIDE**2, NEXT_SIDE, (START,), (END,))),
    "deepseek_vl_hybrid": Tiny(tf.DeepseekVLHybridForConditionalGeneration, configs.deepseek_vl_hybrid, _two_towers),
    "deepseek_vl": Tiny(tf.DeepseekVLForConditionalGeneration, configs.deepseek_vl, _one_raster(NEXT_SIDE**2, NEXT_SIDE)),
}
"""By a name of the tests: the model type, or the model type and a variant of it."""
NAMES = tuple(TINY)


# -- models ------------------------------------------------------------------------------------------------------------------


def build(name: str, attention: str | None = None, seed: int = 0) -> Any:
    """A fresh model in evaluation mode (float32); the same seed gives the same weights for every attention.

    Args:
        name: a key of `TINY`.
        attention: the implementation; None for the family's own choice.
    """
    tiny = TINY[name]
    config = tiny.config()
    if attention is not None:
        config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(seed + tiny.seed)
        model = tiny.model(config).float()
        for full_name, weight in model.named_parameters():
            constant = weight.detach().flatten()[0].item()
            if weight.ndim == 1 and bool((weight == constant).all()):
                torch.nn.init.normal_(weight, constant, 0.05)
            elif full_name.endswith("A_log"):  # of gated delta rules: a memory of several tokens, else nearly one
                torch.nn.init.uniform_(weight, -3.0, -1.0)
            elif weight.ndim > 1:
                torch.nn.init.normal_(weight, 0.0, 0.18 if "lm_head" in full_name else DEVIATION)
    settings = model.generation_config
    settings.eos_token_id = settings.bos_token_id = None
    settings.pad_token_id = PAD
    settings.suppress_tokens = SUPPRESS
    settings.do_sample = False
    return model.eval()


@functools.cache
def shared(name: str, attention: str | None = None, seed: int = 0) -> Any:
    """One model per arguments for a whole test run, with transformers' own permanent hooks already installed.

    Wrap it only in a `with` statement.
    """
    model = build(name, attention, seed)
    with torch.no_grad():
        inputs = make_inputs(name, [["text2", "image", "text2"]])
        model(**inputs, output_hidden_states=True)  # the flag matters: without one, no hook is installed
        model.generate(**inputs, max_new_tokens=2)
    return model


# -- inputs ------------------------------------------------------------------------------------------------------------------


BATCHES = {
    "one": [["text4", "image", "text5"]],
    "long": [["text8", "image", "text30"]],
    "pictures": [["text2", "image", "text3", "image", "text4"]],
    "ragged": [["text3", "image", "text6"], ["text2", "image", "text3", "image", "text4"], ["image", "text5"]],
    "text row": [["text2", "image", "text9"], ["text11"], ["text1", "image", "image", "text3"]],
    "video": [["text4", "video", "text5"]],
    "two videos": [["text2", "video", "text3", "video", "text4"]],
    "videos, ragged": [["text3", "video", "text6"], ["text2", "video", "text3", "video", "text4"], ["video", "text5"]],
    "picture, video": [["text2", "image", "text3", "video", "text4"], ["text3", "image", "video", "text6"]],
    "video, picture": [["text2", "video", "text3", "image", "text4"], ["text3", "video", "image", "text6"]],
    "video, text row": [["text2", "video", "text9"], ["text11"]],
}
"""By a name of the tests. `long` is beyond the window at the prompt, `one` only in decoding or not at all; the rows of `ragged`
have different lengths, and different numbers of visual tokens wherever pictures may have different sizes or numbers."""


def make_inputs(name: str, samples: list[list[str]], seed: int = 0, first: int = 0, pad: str = "left") -> dict[str, Any]:
    """Inputs for `model(**inputs)` and `model.generate(**inputs)`.

    Args:
        name: a key of `TINY`.
        samples: for every row its parts: `"image"`, `"video"` or `"textN"` (N random words).
        seed, first: row `i` depends on `seed` and `first + i` only.
        pad: the side of the padding.
    """
    tiny, rows, pictures = TINY[name], [], []
    for index, parts in enumerate(samples, start=first):
        random = torch.Generator().manual_seed(1_000_003 * seed + index)
        ids: list[int] = []
        of_row: list[Picture] = []
        if tiny.pictures_first:
            parts = sorted(parts, key=lambda part: part != "image")
        for part in parts:
            if part in ("image", "video"):
                of_row.append((tiny.picture if part == "image" else tiny.video)(random, index + len(of_row)))
                ids += of_row[-1].ids
            else:
                ids += torch.randint(FIRST_WORD, VOCAB, (int(part.removeprefix("text")),), generator=random).tolist()
        rows.append(ids)
        pictures.append(of_row)
    length = max(len(ids) for ids in rows)
    input_ids = torch.full((len(rows), length), PAD)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        place = slice(length - len(ids), length) if pad == "left" else slice(0, len(ids))
        input_ids[row, place] = torch.tensor(ids)
        attention_mask[row, place] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **tiny.collate(pictures, length)}
    if tiny.kinds:
        videos = input_ids == VIDEO
        if tiny.video is _glm_video:
            videos = (input_ids == IMAGE) & ((input_ids == BREAK).cumsum(1) > (input_ids == FAKE).cumsum(1))
        inputs[tiny.kinds] = ((input_ids == IMAGE) & ~videos).long() * tiny.kind_of_image + videos * 2
    return inputs


def make_single(name: str, samples: list[list[str]], row: int, seed: int = 0) -> dict[str, Any]:
    """Row `row` of `make_inputs(name, samples, seed)`, alone and without padding."""
    return make_inputs(name, samples[row : row + 1], seed, first=row)


def extended(name: str, inputs: dict[str, Any], new: torch.Tensor) -> dict[str, Any]:
    """The inputs with `new` `[batch, n]` generated tokens behind a left-padded prompt."""
    tiny, ids = TINY[name], inputs["input_ids"]
    longer = {
        **inputs,
        "input_ids": torch.cat([ids, new], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1),
    }
    if tiny.kinds:
        longer[tiny.kinds] = torch.cat([inputs[tiny.kinds], torch.full_like(new, tiny.kind_of_new)], 1)
    return longer


def visual_columns(inputs: dict[str, Any]) -> torch.Tensor:
    """`[batch, sequence]`: where the placeholders are."""
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


__all__ = ["BATCHES", "LAYERS", "NAMES", "TINY", "build", "extended", "make_inputs", "make_single", "shared", "visual_columns"]

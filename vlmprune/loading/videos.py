"""Read a video: some frames of a file, decoded by PyAV, or the pictures of a folder; and what a processor is told of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlmprune.errors import UsageError, first_line
from vlmprune.loading.pictures import SCHEMES, open_picture

if TYPE_CHECKING:
    import numpy as np

FRAMES = 8
"""How many frames of a file are taken if nothing else is said."""


@dataclass(frozen=True)
class Video:
    """Frames of a video.

    Attributes:
        frames: upright RGB pictures of one size.
        index: of each among all frames of the video, rising.
        total: how many frames the video has.
        rate: frames per second of the video; None if unknown.
        notes: one sentence for everything that was lost.
    """

    frames: list[Image.Image]
    index: list[int]
    total: int
    rate: float | None = None
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.frames)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def times(self) -> list[float] | None:
        """Seconds at which each frame is shown; None if unknown."""
        return None if self.rate is None else [index / self.rate for index in self.index]

    def pixels(self) -> np.ndarray[Any, Any]:
        """`[frame, row, column, 3]` uint8."""
        import numpy as np

        return np.stack([np.asarray(frame) for frame in self.frames])

    def metadata(self) -> dict[str, Any]:
        """What transformers' processors are told of a video whose frames were chosen before."""
        width, height = self.frames[0].size
        return {
            "total_num_frames": self.total,
            "fps": self.rate,
            "width": width,
            "height": height,
            "duration": None if self.rate is None else self.total / self.rate,
            "frames_indices": list(self.index),
        }


def chosen(total: int, frames: int | None, rate: float | None, fps: float | None, name: str) -> list[int]:
    """Indices of the frames to take: ⌊i · total / n⌋ for i = 0 … n − 1, as transformers samples.

    Args:
        total: frames of the video.
        frames: n; `FRAMES`, or all if there are fewer, where neither it nor `fps` is given.
        rate: frames per second of the video, or None.
        fps: how many frames of each second to take, instead of `frames`.
        name: of the video, for sentences.

    Raises:
        UsageError: there are not so many, or not so many in a second.
    """
    if frames is not None and frames > total:
        raise UsageError(f"{name} has {total} frame{'' if total == 1 else 's'}, found --frames {frames}: give at most {total}.")
    count = frames if frames is not None else min(FRAMES, total)
    if fps is not None:
        if rate is None:
            raise UsageError(f"{name} does not say how many frames it has in a second: give --frames instead of --fps.")
        if fps > rate:
            raise UsageError(f"{name} has {rate:g} frames in a second, found --fps {fps:g}: give at most {rate:g}.")
        count = max(int(total / rate * fps), 1)
    return [place * total // count for place in range(count)]


def check_video(path: Path, frames: int | None, fps: float | None) -> None:
    """Refuse what can be refused before anything is decoded.

    Raises:
        UsageError: there is no such file or folder, it is empty, PyAV is missing, or `frames` and `fps` exclude each other.
    """
    if frames is not None and fps is not None:
        raise UsageError(f"found --frames {frames} and --fps {fps:g}: give one of them.")
    if (scheme := str(path).partition(":")[0].lower()) in SCHEMES and not path.exists():
        raise UsageError(f"{scheme}:… is an address: download the video and give the path of the file.")
    path = path.expanduser()
    if not path.exists():
        raise UsageError(f"there is no video at {path}: give the path of a video file, or of a folder with its frames.")
    if path.is_dir():
        if fps is not None:
            raise UsageError(f"{path} is a folder of frames, which have no times: give --frames instead of --fps.")
        if not _pictures(path):
            raise UsageError(f"there is no picture in {path}: give a folder with the frames of a video, or a video file.")
        return
    if path.stat().st_size == 0:
        raise UsageError(f"{path} is empty: give a video file, or a folder with its frames.")
    if find_spec("av") is None:
        raise UsageError(
            "decoding a video file needs av: install it with `pip install 'vlmprune[video]'`, or give a folder with the frames "
            "as pictures."
        )


def open_video(
    path: str | Path,
    frames: int | None = None,
    fps: float | None = None,
    report: Callable[[str], object] = warnings.warn,
) -> Video:
    """Read some frames of a video.

    Args:
        path: of a file that FFmpeg can decode, or of a folder with the frames as pictures, in the order of their names, where
            numbers count as numbers.
        frames: how many, evenly spaced. If neither this nor `fps` is given: 8 of a file, all of a folder.
        fps: how many of each second, of a file.
        report: called with one sentence for everything that is lost.

    Raises:
        UsageError: there is no such file or folder, nothing can be decoded, the frames have different sizes, or there are too
            few; says which.
    """
    path = Path(path)
    check_video(path, frames, fps)
    path, notes = path.expanduser(), []

    def note(sentence: str) -> None:
        notes.append(sentence)
        report(sentence)

    return _folder(path, frames, notes, note) if path.is_dir() else _file(path, frames, fps, notes, note)


def _pictures(folder: Path) -> list[Path]:
    """The pictures of a folder: of `frame2.png` and `frame10.png`, the first comes first."""
    Image.init()
    readable = {ending for ending, form in Image.registered_extensions().items() if form in Image.OPEN}
    found = [path for path in folder.iterdir() if path.suffix.lower() in readable and path.is_file()]
    return sorted(found, key=lambda path: (_numbered(path.name), path.name))


def _numbered(name: str) -> list[str | int]:
    """A name in pieces, every second of which is a number."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


def _folder(folder: Path, frames: int | None, notes: list[str], note: Callable[[str], object]) -> Video:
    paths = _pictures(folder)
    index = chosen(len(paths), len(paths) if frames is None else frames, None, None, str(folder))
    pictures = [open_picture(paths[place], note) for place in index]
    _check_sizes(pictures, [str(paths[place]) for place in index], "leave out the pictures that are no frames")
    return Video(pictures, index, len(paths), None, notes)


def _file(path: Path, frames: int | None, fps: float | None, notes: list[str], note: Callable[[str], object]) -> Video:
    total, rate, broken = _count(path)
    index = chosen(total, frames, rate, fps, str(path))
    if broken:
        note(f"{path}: only its first {total} frames can be decoded ({broken})")
    wanted, pictures = set(index), []
    for place, frame in enumerate(_decoded(path)):
        if place in wanted:
            picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
            turn = round(getattr(frame, "rotation", 0)) % 360
            pictures.append(picture.rotate(turn, expand=True) if turn else picture)
        if len(pictures) == len(wanted):
            break
    _check_sizes(pictures, [f"frame {place} of {path}" for place in index], "encode it anew in one size")
    return Video(pictures, index, total, rate, notes)


def _check_sizes(pictures: Sequence[Image.Image], names: Sequence[str], instead: str) -> None:
    """Refuse frames of different sizes.

    Args:
        names: of the frames.
        instead: what to do.

    Raises:
        UsageError: names two of them.
    """
    for picture, name in zip(pictures, names, strict=True):
        if picture.size != pictures[0].size:
            first, other = (f"{size[0]} × {size[1]}" for size in (pictures[0].size, picture.size))
            raise UsageError(
                f"the frames of a video have one size, found {first} pixels in {names[0]} and {other} in {name}: {instead}."
            )


def _count(path: Path) -> tuple[int, float | None, str]:
    """How many frames can be decoded, how many there are in a second, and what stops decoding before the end, if anything does.
    They are decoded for this: what files state is not always true."""
    import av

    total, broken = 0, ""
    try:
        for _ in _decoded(path):
            total += 1
    except av.error.FFmpegError as error:
        broken = error.strerror or first_line(error)
    if not total:
        why = f" ({broken})" if broken else ""
        raise UsageError(
            f"no frame of {path} can be decoded{why}: give a video file that FFmpeg can read, or a folder of frames."
        )
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
    return total, float(rate) if rate else None, broken


def _decoded(path: Path) -> Any:
    """Every frame of the first video stream, in the order in which they are shown.

    Raises:
        UsageError: it is no video, or has sound only.
    """
    import av

    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise UsageError(
            f"{path} cannot be read as a video ({error.strerror or first_line(error)}): give a file that FFmpeg can read, or a "
            "folder of frames."
        ) from error
    with container:
        if not container.streams.video:
            raise UsageError(f"{path} has no pictures, only {_others(container.streams)}: give a video.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield from container.decode(stream)


def _others(streams: Any) -> str:
    return " and ".join(sorted({stream.type for stream in streams})) or "an empty container"


@dataclass(frozen=True)
class VideoFile:
    """A video that is read when its frames are asked for: `open_video(path, count)`."""

    path: Path
    count: int | None = None

    def frames(self) -> Video:
        """The frames; those of the last few videos are kept.

        Raises:
            UsageError: as `open_video`.
        """
        return _kept(self.path, self.count)


@lru_cache(maxsize=8)
def _kept(path: Path, count: int | None) -> Video:
    return open_video(path, count)


# -- for processors and models -----------------------------------------------------------------------------------------------


def video_of(frames: Any) -> Video:
    """A video; a list of frames is one of which all frames are given, at unknown times."""
    if isinstance(frames, Video):
        return frames
    pictures = list(frames)
    return Video(pictures, list(range(len(pictures))), len(pictures))


def video_arguments(processor: Any, videos: Sequence[Any]) -> dict[str, Any]:
    """Arguments of a processor for videos whose frames were chosen before. `videos`: each a `Video`, or a list of frames.

    Raises:
        UsageError: the processor has no part for videos.
    """
    check_processor(processor)
    if getattr(processor, "video_processor", None) is None:  # that of the embedded model takes frames, and nothing else
        return {"videos": [list(frames) for frames in videos]}
    known = [video_of(frames) for frames in videos]
    metadata = [video.metadata() for video in known]
    return {
        "videos": [video.pixels() for video in known],
        "videos_kwargs": {"video_metadata": metadata, "do_sample_frames": False},
    }


def check_shown(config: Any, kinds: Collection[str]) -> None:
    """Refuse a model that does not take what is shown.

    Args:
        config: the model's.
        kinds: "picture", "video", or both.

    Raises:
        UsageError: it takes no videos, or not together with pictures.
    """
    from vlmprune.adapters.registry import family_of

    family = family_of(config)
    if "video" not in kinds:
        return
    if family.videos is None:
        raise UsageError(f"{family.name} takes no videos here: show it pictures, or choose another model.")
    if "picture" in kinds and family.videos.token(config) == family.image_token(config):
        raise UsageError(
            f"{family.name} has one placeholder for pictures and videos, so that it cannot be shown both: give --image or "
            "--video."
        )


def check_processor(processor: Any) -> None:
    """Refuse a processor without its part for videos.

    Raises:
        UsageError: it has none.
    """
    name = type(processor).__name__
    if not getattr(processor, "video_token", None):
        raise UsageError(f"the model reads no videos: its {name} has no video token; take one that does, or show it pictures.")
    if getattr(processor, "lacks_torchvision", False) and not hasattr(processor, "video_processor"):
        raise UsageError(
            f"videos need torchvision here, of which the video part of this model's {name} is made: install the version that "
            "belongs to this torch."
        )

"""What one question is about: a picture, a video, or both, as named on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmprune.errors import UsageError
from vlmprune.loading.pictures import open_picture
from vlmprune.loading.videos import Video, check_video, open_video

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Shown:
    """A picture, a video, or both.

    Attributes:
        image: path of a picture.
        video: path of a video file, or of a folder with its frames.
        frames: how many frames to take of the video.
        fps: how many frames to take of each second of the video, instead.

    Raises:
        UsageError: neither is given, or `frames` or `fps` without a video.
    """

    image: Path | None = None
    video: Path | None = None
    frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.image is None and self.video is None:
            raise UsageError(
                "nothing is shown: give --image with a picture, or --video with a video file or a folder of frames."
            )
        if self.video is None and (self.frames is not None or self.fps is not None):
            raise UsageError("--frames and --fps choose frames of a video: give --video, or leave them out.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """ "picture", "video", or both."""
        given = {"picture": self.image, "video": self.video}
        return tuple(kind for kind, path in given.items() if path is not None)

    def check(self) -> None:
        """Refuse what can be refused before torch is imported and a video is decoded.

        Raises:
            UsageError: a file is missing or cannot be read.
        """
        if self.image is not None:
            open_picture(self.image, lambda note: None)
        if self.video is not None:
            check_video(self.video, self.frames, self.fps)

    def open(self, report: Callable[[str], object]) -> tuple[Image.Image | None, Video | None]:
        """The picture and the video.

        Args:
            report: called with one sentence for everything that is lost.

        Raises:
            UsageError: one of them cannot be read.
        """
        picture = None if self.image is None else open_picture(self.image, report)
        video = None if self.video is None else open_video(self.video, self.frames, self.fps, report)
        return picture, video

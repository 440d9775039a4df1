"""The embedded clips for MMAction2: drawn when they are first asked for."""

from pathlib import Path

from mmaction.datasets import VideoDataset
from mmaction.registry import DATASETS

from wsbcn_mm.shapes import clips


@DATASETS.register_module()
class ShapesClipsDataset(VideoDataset):
    """`wsbcn_mm.shapes.clips` as videos; the arguments are VideoDataset's.

    Args:
        ann_file: The list of videos, such as ``'data/clips/train_videos.txt'``; where the folder
            that it lies in does not exist, the data set is drawn there first (half a minute; safe
            for several processes at once).
    """

    METAINFO = dict(classes=clips.MOTIONS)

    def __init__(self, ann_file: str, *args, **kwargs) -> None:
        clips.draw_clips(Path(ann_file).parent)
        super().__init__(ann_file, *args, **kwargs)

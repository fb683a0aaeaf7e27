"""The known datasets: where their files lie, which splits they have, what their labels mean.

A path pattern is relative to the dataset's folder. `{key}` is the image's name (sub-folders included), `{split}` the
folder of the split, `{name}` the split's own name, `{ext}` png, jpg or jpeg; any other word in braces is one folder.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from fmda.data.classes import class_list


@dataclass(frozen=True)
class Labels:
    """One possible place of the labels.

    `class_map` leads from the ids in the file to the class list; `red16` is SYNTHIA's form; `lacks_255`: 255
    does not occur in the published files, so that it is a sign of ids that were reduced by one.
    """

    pattern: str
    class_map: str | None = None
    red16: bool = False
    lacks_255: bool = False


@dataclass(frozen=True)
class Layout:
    """One way in which a dataset lies on disk: the images, and where the labels may be, best first."""

    images: str
    labels: tuple[Labels, ...] = ()


@dataclass(frozen=True)
class Split:
    """One part of a dataset: its folders, or list file, or the images whose name starts in a certain way.

    `part` cuts the sorted images; `size` is the published number of images.
    """

    folders: tuple[str, ...] = ("",)
    size: int | None = None
    listed: str | None = None
    starts: tuple[str, ...] = ()
    part: tuple[int, int | None] | None = None
    labelled: bool = True


@dataclass(frozen=True)
class Entry:
    """A dataset. `places` are its usual folders below the data root; a `free` one has splits of the user's names."""

    title: str
    classes: str
    places: tuple[str, ...]
    layouts: tuple[Layout, ...]
    splits: dict[str, Split] = field(default_factory=dict)
    home: str = ""
    note: str = ""
    free: bool = False


_IDS = "cityscapes-ids-to-cityscapes"
_CAMVID = ("train", "val", "test")
_CAMVID_DAY = ("0006R0", "0016E5", "Seq05VD")


def _splits(train: int, val: int, unlabelled_test: int | None = None) -> dict[str, Split]:
    """Returns splits whose folder has their own name."""
    splits = {"train": Split(("train",), train), "val": Split(("val",), val)}
    return splits if unlabelled_test is None else splits | {"test": Split(("test",), unlabelled_test, labelled=False)}


def _listed(folder: str, train: int, val: int) -> dict[str, Split]:
    return {
        name: Split(("",), size, listed=f"ImageSets/{folder}/{name}.txt")
        for name, size in (("train", train), ("val", val))
    }


def _by_ids(images: str, labels: str) -> Layout:
    """Returns a layout in Cityscapes' manner: labels in train ids, or in Cityscapes' own ids."""
    return Layout(images, (Labels(f"{labels}TrainIds.png"), Labels(f"{labels}Ids.png", _IDS)))


def _by_map(images: str, labels: str, class_map: str, red16: bool = False) -> Layout:
    """Returns a layout of labels in train ids, as converters name them, or as they are published."""
    return Layout(images, (Labels(f"{labels}_labelTrainIds.png"), Labels(f"{labels}.png", class_map, red16)))


_ANONYMOUS = _by_ids("rgb_anon/{split}/{key}_rgb_anon.png", "gt/{split}/{key}_gt_label")


def _acdc(condition: str, val: int, count: int = 1, *flat: Layout) -> Entry:
    """Returns ACDC of one condition, or of all `count` by the placeholder {condition}."""
    place = f"{condition}/{{split}}/{{key}}"
    return Entry(
        title="ACDC, adverse conditions" + (f": {condition}" if count == 1 else ""),
        classes="cityscapes",
        places=("acdc", "ACDC"),
        layouts=(_by_ids(f"rgb_anon/{place}_rgb_anon.png", f"gt/{place}_gt_label"), *flat),
        splits=_splits(400 * count, val, unlabelled_test=500 * count),
        home="https://acdc.vision.ee.ethz.ch",
    )


_VOC = Entry(
    title="PASCAL VOC 2012, 20 classes without background",
    classes="voc20",
    places=("VOCdevkit/VOC2012", "VOC2012", "voc"),
    layouts=(Layout("JPEGImages/{key}.{ext}", (Labels("SegmentationClass/{key}.png", "voc21-to-voc20"),)),),
    splits=_listed("Segmentation", 1464, 1449),
    home="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
)
_ADE20K_FILES = Labels("annotations/{split}/{key}.png", "ade20k-ids-to-ade20k", lacks_255=True)
_CONTEXT_FILES = "SegmentationClassContext/{key}.png"
_CONTEXT = Entry(
    title="PASCAL-Context, 59 classes without background",
    classes="context59",
    places=("VOCdevkit/VOC2010", "VOC2010", "context"),
    layouts=(Layout("JPEGImages/{key}.{ext}", (Labels(_CONTEXT_FILES, "context60-to-context59"),)),),
    splits=_listed("SegmentationContext", 4998, 5105),
    home="https://cs.stanford.edu/~roozbeh/pascal-context/",
    note="label PNGs are made from trainval_merged.json with the Detail API",
)


def _mapillary(class_map: str, note: str) -> Entry:
    labels = (
        Labels("{split}/labels/{key}_labelTrainIds.png"),
        Labels("{split}/v1.2/labels/{key}.png", class_map),
        Labels("{split}/labels/{key}.png", class_map),
    )
    return Entry(
        title="Mapillary Vistas v1.2 in the Cityscapes classes",
        classes="cityscapes",
        places=("mapillary", "mapillary-vistas", "mapillary_vistas"),
        layouts=(
            Layout("{split}/images/{key}.{ext}", labels),
            Layout("half/{name}_img/{key}.{ext}", (Labels("half/{name}_label/{key}.png"),)),
        ),
        splits={
            "train": Split(("training",), 18000),
            "val": Split(("validation",), 2000),
            "test": Split(("testing",), 5000, labelled=False),
        },
        home="https://www.mapillary.com/dataset/vistas",
        note=note,
    )


CATALOG: dict[str, Entry] = {
    "cityscapes": Entry(
        title="Cityscapes",
        classes="cityscapes",
        places=("cityscapes", "samples/cityscapes"),
        layouts=(_by_ids("leftImg8bit/{split}/{key}_leftImg8bit.png", "gtFine/{split}/{key}_gtFine_label"),),
        splits=_splits(2975, 500, unlabelled_test=1525),
        home="https://www.cityscapes-dataset.com",
    ),
    "gta5": Entry(
        title="GTA5, Playing for Data",
        classes="cityscapes",
        places=("gta5", "gta", "GTA5"),
        layouts=(_by_map("images/{key}.png", "labels/{key}", "gta5-ids-to-cityscapes"),),
        splits={"train": Split(size=24966)},
        home="https://download.visinf.tu-darmstadt.de/data/from_games/",
    ),
    "synthia": Entry(
        title="SYNTHIA-RAND-CITYSCAPES",
        classes="cityscapes",
        places=("synthia", "RAND_CITYSCAPES", "SYNTHIA_RAND_CITYSCAPES"),
        layouts=(_by_map("RGB/{key}.png", "GT/LABELS/{key}", "synthia-ids-to-cityscapes", red16=True),),
        splits={"train": Split(size=9400)},
        home="http://synthia-dataset.net",
        note="terrain, truck and train do not occur; score on synthia16 or synthia13",
    ),
    "bdd10k": Entry(
        title="BDD100K, the 10k images with semantic labels",
        classes="cityscapes",
        places=("bdd10k", "bdd100k", "bdd", "samples/bdd10k"),
        layouts=(Layout("images/10k/{split}/{key}.{ext}", (Labels("labels/sem_seg/masks/{split}/{key}.png"),)),),
        splits=_splits(7000, 1000, unlabelled_test=2000),
        home="https://bdd-data.berkeley.edu",
    ),
    "mapillary": _mapillary("mapillary-ids-to-cityscapes", "classes matched by name, generously"),
    "mapillary-strict": _mapillary("mapillary-ids-to-cityscapes-strict", "only plain counterparts"),
    "acdc": _acdc("{condition}", 406, 4, _ANONYMOUS),
    **{f"acdc-{name}": _acdc(name, 106 if name == "night" else 100) for name in ("fog", "night", "rain", "snow")},
    "dark-zurich": Entry(
        title="Dark Zurich; train is by night",
        classes="cityscapes",
        places=("dark_zurich", "dark-zurich", "Dark_Zurich"),
        layouts=(_ANONYMOUS,),
        splits={
            "train": Split(("train/night",), 2416, labelled=False),
            "train-twilight": Split(("train/twilight",), labelled=False),
            "train-day": Split(("train/day",), labelled=False),
            "val": Split(("val",), 50),
            "test": Split(("test",), 151, labelled=False),
        },
        home="https://www.trace.ethz.ch/publications/2019/GCMA_UIoU/",
    ),
    "voc20": _VOC,
    "voc21": replace(
        _VOC,
        title="PASCAL VOC 2012 with background",
        classes="voc21",
        layouts=(Layout("JPEGImages/{key}.{ext}", (Labels("SegmentationClass/{key}.png"),)),),
    ),
    "context59": _CONTEXT,
    "context60": replace(
        _CONTEXT,
        title="PASCAL-Context with background",
        classes="context60",
        layouts=(Layout("JPEGImages/{key}.{ext}", (Labels(_CONTEXT_FILES),)),),
    ),
    "ade20k": Entry(
        title="ADE20K scene parsing, 150 classes",
        classes="ade20k",
        places=("ade20k", "ADEChallengeData2016", "ade/ADEChallengeData2016"),
        layouts=(Layout("images/{split}/{key}.{ext}", (_ADE20K_FILES,)),),
        splits={"train": Split(("training",), 20210), "val": Split(("validation",), 2000)},
        home="https://groups.csail.mit.edu/vision/datasets/ADE20K/",
    ),
    "coco-stuff": Entry(
        title="COCO-Stuff 164k, 171 classes",
        classes="coco-stuff",
        places=("coco_stuff164k", "coco-stuff", "coco_stuff", "samples/coco-stuff"),
        layouts=tuple(
            Layout(
                f"images/{folder}/{{key}}.{{ext}}",
                (
                    Labels(f"annotations/{folder}/{{key}}_labelTrainIds.png"),
                    Labels(f"annotations/{folder}/{{key}}.png", "coco-stuff-ids-to-coco-stuff"),
                    Labels(f"labels/{folder}/{{key}}.png", "coco-stuff-ids-to-coco-stuff"),
                ),
            )
            for folder in ("{split}", "{name}")
        ),
        splits={"train": Split(("train2017",), 118287), "val": Split(("val2017",), 5000)},
        home="https://github.com/nightrome/cocostuff",
    ),
    "camvid": Entry(
        title="CamVid, 11 classes; dusk is sequence 0001TP, day the others; val is by day",
        classes="camvid",
        places=("camvid", "CamVid"),
        layouts=(
            Layout("{split}/images/{key}.{ext}", (Labels("{split}/labels/{key}.png"),)),
            Layout("{split}/{key}.{ext}", (Labels("{split}annot/{key}.png"),)),
        ),
        splits=_splits(367, 101)
        | {
            "test": Split(("test",), 233),
            "all": Split(_CAMVID, 701),
            "dusk": Split(_CAMVID, 124, starts=("0001TP",)),
            "day": Split(_CAMVID, 577, starts=_CAMVID_DAY),
            "train-dusk": Split(("train",), 62, starts=("0001TP",)),
            "train-day": Split(("train",), 305, starts=_CAMVID_DAY),
            "test-dusk": Split(("test",), 62, starts=("0001TP",)),
            "test-day": Split(("test",), 171, starts=_CAMVID_DAY),
            "0001TP": Split(_CAMVID, 124, starts=("0001TP",)),
            "0006R0": Split(_CAMVID, 101, starts=("0006R0",)),
            "0016E5": Split(_CAMVID, 305, starts=("0016E5",)),
            "Seq05VD": Split(_CAMVID, 171, starts=("Seq05VD",)),
        },
        home="http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/",
    ),
    "kitti-semantics": Entry(
        title="KITTI semantics; train and val are the first 100 images, test the last 100",
        classes="cityscapes",
        places=("kitti-semantics", "kitti_semantics", "data_semantics"),
        layouts=(Layout("training/image_2/{key}.{ext}", (Labels("training/semantic/{key}.png", _IDS),)),),
        splits={
            "train": Split(size=100, part=(0, 100)),
            "val": Split(size=100, part=(0, 100)),
            "test": Split(size=100, part=(100, None)),
            "all": Split(size=200),
        },
        home="https://www.cvlibs.net/datasets/kitti/eval_semantics.php",
    ),
    "folder": Entry(
        title="any folder of images/ and labels/ with a classes.yaml; divided into splits or not",
        classes="",
        places=(),
        layouts=(
            Layout("{split}/images/{key}.{ext}", (Labels("{split}/labels/{key}.png"),)),
            Layout("images/{split}/{key}.{ext}", (Labels("labels/{split}/{key}.png"),)),
            Layout("images/{key}.{ext}", (Labels("labels/{key}.png"),)),
            Layout("{key}.{ext}"),
        ),
        free=True,
        note="an undivided folder is split 'val' or 'all'; bare images open with labels=False, also as 'train'",
    ),
    "world": Entry(
        title="a rendered street-world folder; a domain's folder is a split",
        classes="cityscapes",
        places=("world",),
        layouts=(
            Layout("{split}/images/{key}.{ext}", (Labels("{split}/labels/{key}.png"),)),
            Layout("images/{key}.{ext}", (Labels("labels/{key}.png"),)),
        ),
        free=True,
        note="written by `fmda data render`; a single domain's folder is split 'val' or 'all'",
    ),
}

ALIASES = {
    "gta": "gta5",
    "bdd": "bdd10k",
    "bdd100k": "bdd10k",
    "cocostuff": "coco-stuff",
    "kitti": "kitti-semantics",
    "darkzurich": "dark-zurich",
}


def known_datasets() -> list[dict[str, Any]]:
    """Returns one row per dataset: name, title, classes (count), splits, layout, places, home, note."""
    return [
        {
            "name": name,
            "title": entry.title,
            "classes": len(class_list(entry.classes)) if entry.classes else 0,
            "splits": {split: part.size for split, part in entry.splits.items()} or {"any": None},
            "layout": describe(entry),
            "places": list(entry.places),
            "home": entry.home,
            "note": entry.note,
        }
        for name, entry in CATALOG.items()
    ]


def describe(entry: Entry) -> str:
    """Returns the expected files in one line: the images' pattern and the labels' patterns of each layout."""
    return "; or ".join(
        layout.images + "".join(f" + {labels.pattern}" for labels in layout.labels[:1]) for layout in entry.layouts
    )

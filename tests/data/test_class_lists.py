"""Class lists, prompts, and maps between lists."""

import hashlib

import numpy as np
import pytest
import yaml

from fmda.data import ClassList, ClassMap, class_list, known_class_lists, known_class_maps, prompts
from fmda.data.classes import LIST_FORM, MAP_FORM, default_palette
from fmda.errors import UserError

COUNTS = {
    "cityscapes": 19,
    "cityscapes-ids": 34,
    "gta5-ids": 35,
    "synthia-ids": 23,
    "synthia16": 16,
    "synthia13": 13,
    "voc20": 20,
    "voc21": 21,
    "context59": 59,
    "context60": 60,
    "ade20k": 150,
    "ade20k-ids": 151,
    "coco-stuff": 171,
    "coco-stuff-ids": 182,
    "camvid": 11,
    "mapillary-ids": 66,
}


def test_every_known_list_has_its_published_count_and_no_duplicate() -> None:
    assert {name: len(class_list(name)) for name in known_class_lists()} == COUNTS
    assert all(len(set(class_list(name).names)) == count for name, count in COUNTS.items())


@pytest.mark.parametrize(
    ("name", "position", "expected"),
    [
        ("cityscapes", 18, "bicycle"),
        ("cityscapes-ids", 26, "car"),
        ("ade20k", 44, "chest of drawers"),
        ("ade20k", 149, "flag"),
        ("coco-stuff", 80, "banner"),
        ("coco-stuff-ids", 181, "wood"),
        ("context59", 26, "flower"),
        ("mapillary-ids", 50, "Traffic Sign (Front)"),
        ("synthia-ids", 21, "wall"),
    ],
)
def test_names_stand_at_their_published_label(name: str, position: int, expected: str) -> None:
    assert class_list(name).names[position] == expected


# characters and SHA-256 of the published NACLIP name files, lines joined by a line feed
NACLIP = {
    "cityscapes": (138, "6f6782fc1bf92bfd"),
    "voc20": (283, "c68f65a2b342397c"),
    "context59": (378, "cd808465f06a1616"),
    "ade20k": (1103, "e53ded02c488bdb9"),
    "coco-stuff": (1374, "fb98709b9ab1baff"),
}


@pytest.mark.parametrize("name", NACLIP)
def test_naclip_prompts_are_the_published_name_files(name: str) -> None:
    text = "\n".join(", ".join(names) for names in prompts(name, "naclip"))
    assert (len(text), hashlib.sha256(text.encode()).hexdigest()[:16]) == NACLIP[name]


def test_voc20_has_thirty_naclip_queries() -> None:
    found = prompts("voc20", "naclip")
    assert sum(map(len, found)) == 30
    assert found[3] == ("ship",) and found[10] == ("table",) and len(found[14]) == 7 and len(found[19]) == 5


def test_plain_prompts_keep_blanks() -> None:
    assert prompts("cityscapes")[6] == ("traffic light",)
    assert prompts("voc20")[10] == ("dining table",)
    # the published list of MaskCLIP and CLIP-DINOiser has this blank, and ranking files use it as a key
    assert prompts("ade20k")[7] == ("bed ",)


def test_unknown_prompt_style_is_named() -> None:
    with pytest.raises(UserError, match="'naclop': no such prompt style; did you mean 'naclip'"):
        prompts("cityscapes", "naclop")


@pytest.mark.parametrize("name", ["diningtable", "dining table", "Dining-Table", "table"])
def test_index_finds_a_class_by_any_of_its_spellings(name: str) -> None:
    assert class_list("voc20").index(name) == 10


def test_official_colours() -> None:
    assert class_list("cityscapes").palette[0].tolist() == [128, 64, 128]
    assert class_list("ade20k").palette[149].tolist() == [92, 0, 255]
    np.testing.assert_array_equal(default_palette(20), class_list("voc20").palette)


def test_a_list_survives_its_file(tmp_path) -> None:
    for name in ("voc20", "camvid", "ade20k"):
        class_list(name).save(tmp_path / "classes.yaml")
        assert ClassList.load(tmp_path / "classes.yaml") == class_list(name)


def test_users_list_with_colours_prompts_and_void(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("void: [9]\nclasses:\n  - road\n  - {name: car, colour: [1, 2, 3], prompts: [car, van]}\n")
    found = class_list(str(file))
    assert found.names == ("road", "car") and found.prompts == (("road",), ("car", "van"))
    assert found.palette[1].tolist() == [1, 2, 3]
    assert np.flatnonzero(found.allowed()).tolist() == [0, 1, 9, 255]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [road, car, road]", "class 'road' occurs twice"),
        ("classes: [road, 7]", "key 'classes[1].name' is missing"),
        ("classes: []", "needs `classes:`"),
        ("clases: [road]", "unknown key 'clases'; did you mean 'classes'"),
        ("classes: [{name: road, color: [1, 2, 3]}]", "unknown key 'classes[0].color'; did you mean 'colour'"),
        ("classes: [{name: road, colour: [1, 2]}]", "classes[0].colour: expected a list of 3 values"),
        ("classes: [{name: road, colour: [1, 2, 300]}]", "colour[2]: expected a whole number >= 0 and <= 255"),
        ("classes: [road]\nignore: 0", "ignore is 0, but pixels without a class have the value 255"),
        ("classes: [road]\nignore: 0", "drop it by a class map"),
        ("classes: [road]\nignore: x", "ignore is 'x'"),
        ("classes: [road]\nvoid: [0]", "must lie between 1 and 255"),
        ("classes: [road]\nvoid: [0]", "drop it by a class map"),
        ("classes: [road]\nvoid: 2", "void: expected a list, got '2'"),
        ("classes: [road]\nvoid: [two]", "void[0]: expected a whole number, got 'two'"),
        ("classes: [{name: road, colour: [0.5, 0.25, 0.5]}]", "colour[0]: expected a whole number >= 0"),
        ("classes: [road]\npalette: [a]", "palette[0]: expected a list"),
        ("classes: [road]\npalette: [[1, 2, 3], [4, 5, 6]]", "the palette has 2 colours for 1 classes"),
        ("classes: ['']", "class 0 has no name"),
        ("classes: cityscape", "did you mean 'cityscapes'"),
        ("classes: cityscapes\nvoid: [30]", "drop the other keys"),
    ],
)
def test_faulty_class_lists_are_one_line(tmp_path, text: str, message: str) -> None:
    (tmp_path / "classes.yaml").write_text(text)
    with pytest.raises(UserError) as fault:
        ClassList.load(tmp_path / "classes.yaml")
    assert message in str(fault.value) and "\n" not in str(fault.value)


def test_unknown_list_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'cityscapes'"):
        class_list("cityscapse")


def test_cityscapes_ids_become_train_ids() -> None:
    table = ClassMap.load("cityscapes-ids-to-cityscapes").table
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert table[ids].tolist() == list(range(19))
    assert set(table[np.setdiff1d(np.arange(256), ids)].tolist()) == {255}


def test_synthia_ids_become_train_ids() -> None:
    table = ClassMap.load("synthia-ids-to-cityscapes").table
    expected = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13}
    expected |= {18: 14, 19: 15, 20: 16, 12: 17, 11: 18}
    assert {i: int(t) for i, t in enumerate(table) if t != 255} == expected


def test_mapillary_strict_table() -> None:
    text = "13,24,41>0;2,15>1;17>2;6>3;3>4;45,47>5;48>6;50>7;30>8;29>9;27>10;19>11;20,21,22>12;55>13;61>14;54>15;58>16"
    expected = {int(i): int(to) for ids, to in (p.split(">") for p in text.split(";")) for i in ids.split(",")}
    expected |= {57: 17, 52: 18}
    table = ClassMap.load("mapillary-ids-to-cityscapes-strict").table
    assert {i: int(t) for i, t in enumerate(table) if t != 255} == expected


def test_mapillary_by_name_follows_the_rules() -> None:
    city = class_list("cityscapes").names
    rules = [
        (("trafficsign", "front", "back"), "traffic sign"),
        (("onrail",), "train"),
        (("cyclist", "rider"), "rider"),
        (("pole", "streetlight"), "pole"),
        (("curb", "pedestrianarea"), "sidewalk"),
        (("crosswalkplain", "parking", "bikelane", "servicelane", "lanemarking"), "road"),
    ]
    expected = []
    for name in class_list("mapillary-ids").names:
        plain = name.lower().replace(" ", "").replace("-", "")
        exact = [c for c in city if c.replace(" ", "") == plain]
        by_rule = [to for words, to in rules if any(word in plain for word in words)]
        expected.append(city.index((exact + by_rule)[0]) if exact or by_rule else 255)
    assert ClassMap.load("mapillary-ids-to-cityscapes").table[:66].tolist() == expected


def test_coco_stuff_ids_close_up() -> None:
    table = ClassMap.load("coco-stuff-ids-to-coco-stuff").table
    absent = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    kept = np.setdiff1d(np.arange(182), absent)
    assert table[kept].tolist() == list(range(171)) and set(table[absent].tolist()) == {255}


@pytest.mark.parametrize("name", ["voc21-to-voc20", "context60-to-context59", "ade20k-ids-to-ade20k"])
def test_maps_without_background_move_down_by_one(name: str) -> None:
    found = ClassMap.load(name)
    count = len(found.target)
    assert found.table[: count + 1].tolist() == [255, *range(count)] and found.table[count + 1] == 255


def test_camvid_and_cityscapes_both_ways() -> None:
    onward = ClassMap.load("camvid-to-cityscapes").apply(np.array([[*range(11), 255]], np.uint8))
    assert onward.tolist() == [[10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 12, 255]]
    back = ClassMap.load("cityscapes-to-camvid").apply(np.arange(19, dtype=np.uint8))
    assert back.tolist() == [3, 4, 1, 1, 7, 2, 6, 6, 5, 255, 0, 9, 10, 8, 8, 8, 8, 10, 10]


def test_every_known_map_loads_and_keeps_ignore() -> None:
    assert len(known_class_maps()) == 13
    assert all(ClassMap.load(name).table[255] == 255 for name in known_class_maps())


def test_users_map_between_a_file_beside_it_and_a_known_list(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("classes: [tarmac, van, lorry]\n")
    (tmp_path / "map.yaml").write_text("from: mine.yaml\nto: cityscapes\nmap: {tarmac: road, van: car, lorry: truck}\n")
    found = ClassMap.load(tmp_path / "map.yaml")
    assert found.apply(np.array([0, 1, 2, 3, 255], np.uint8)).tolist() == [0, 13, 14, 255, 255]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from: camvid\nto: cityscapes\nmap: {sky: ski}", "'to' class 'ski' is unknown; did you mean 'sky'"),
        ("from: camvid\nto: cityscapes\nmap: {bycyclist: rider}", "did you mean 'bicyclist'"),
        ("from: camvid\nto: cityscapes", "a class map has from:, to: and map:"),
        ("from: camvit\nto: cityscapes\nmap: {sky: sky}", "did you mean 'camvid'"),
        ("from: camvid\nto: cityscapes\nmap: {sky: 3}", "'to' class '3' is unknown"),
        ("from: camvid\nto: cityscapes\nmap: [sky]", "source name: target name"),
    ],
)
def test_faulty_maps_are_one_line(tmp_path, text: str, message: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(UserError) as fault:
        ClassMap.load(tmp_path / "map.yaml")
    assert message in str(fault.value) and "\n" not in str(fault.value)


def test_unknown_map_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'cityscapes-to-camvid'"):
        ClassMap.load("cityscapes-to-camvit")


def test_the_printed_forms_are_read() -> None:
    assert ClassList.from_dict(yaml.safe_load(LIST_FORM)).names == ("road", "car")
    values = yaml.safe_load(MAP_FORM)
    assert class_list(values["from"]).index("bicyclist") == 10 and set(values) == {"from", "to", "map"}

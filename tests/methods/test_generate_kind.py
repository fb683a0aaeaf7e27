"""Image sets through the command line: folder and manifest, resume, refusals by filters, faults, plan."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import small_diffusion
from small_place import borrowed, make_place

from fmda import cli
from fmda.diffusion.draw import SamplerConfig, make_draw
from fmda.diffusion.generate import image_seed
from fmda.diffusion.load import load_stable_diffusion, save_stable_diffusion
from fmda.diffusion.manifest import Manifest
from fmda.errors import UserError
from fmda.evaluate.runs import read_run
from fmda.mesh import make_mesh
from fmda.methods.generate import Config, PromptConfig, draw_images, plan
from fmda.methods.generate.cost import check_memory, memory, read_networks
from fmda.methods.generate.settings import THINGS, FilterConfig, make_prompts
from fmda.methods.judges import clip_score, embed, grid_share
from fmda.methods.kinds import open_run
from fmda.models.sd_unet import UNetConfig
from fmda.png import read_png
from fmda.weights.load import load_clip
from fmda.weights.network import save
from fmda.world.names import CLASSES

UNET = UNetConfig(
    channels=(8,), layers=1, attention=(True,), heads=(2,), context_width=12, groups=4, sample_size=16
)  # fmt: skip
SET = """kind: generate
model: model
prompts: {form: "a {class}", classes: [car, truck]}
count: 10
sample: {sampler: ddim, steps: 2, guidance: 2.0, negative: a road}
"""
RUN = "run set.yaml work_dir=new"
CLIP = "filters.clip=clip filters.clip_score=-1.0 filters.class_presence=0.0 filters.near_duplicate=1.0"


def draw_clip(folder):
    """Gives the CLIP in a folder parameters with which it tells images apart."""
    clip = load_clip(folder)
    params = small_diffusion.drawn(clip.params, 25)
    save("clip", folder.parent / "other", clip.config, params, clip.tokenizer.files())
    shutil.rmtree(folder)
    (folder.parent / "other").rename(folder)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A folder with a diffusion model, a CLIP, `set.yaml` and the finished runs `done` and `judged` (by filters)."""
    folder = tmp_path_factory.mktemp("generate")
    make_place(folder)
    draw_clip(folder / "clip")
    small_diffusion.stable_diffusion(folder / "model", unet_config=UNET)
    (folder / "set.yaml").write_text(SET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(shlex.split("run set.yaml work_dir=done"))
        cli.main(shlex.split(f"run set.yaml work_dir=judged {CLIP}"))
    return folder


@pytest.fixture
def place(pristine, tmp_path, monkeypatch):
    """The folder, which the test may damage, as working directory."""
    with borrowed(pristine, tmp_path / "place"):
        monkeypatch.chdir(pristine)
        yield Path()


def content(folder, *without):
    """Returns {path: bytes} of the files in a folder, but for those of some names."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in without)
    return {path.relative_to(folder): path.read_bytes() for path in files}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, command):
    """Runs a command that must exit with 2 and change nothing; returns the one line it says."""
    capsys.readouterr()
    before = content(Path())
    with pytest.raises(SystemExit) as ended:
        cli.main(shlex.split(command))
    *progress, line = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("fmda: ") and all(text.startswith("[") for text in progress)
    assert content(Path()) == before
    return line


def test_the_folder_holds_images_manifest_and_overview(pristine):
    folder = pristine / "done/images"
    assert {path.name for path in folder.iterdir()} == {
        "images", "identity.json", "manifest.jsonl", "refused.jsonl", "summary.json", "contact-sheet.png",
        "sections.json", "stage.json",
    }  # fmt: skip
    rows = lines(folder / "manifest.jsonl")
    assert [row["file"] for row in rows] == [f"images/im_{j:06d}_p{j % 2}.png" for j in range(10)]
    assert rows[5] == {
        "index": 5, "file": "images/im_000005_p1.png", "prompt": "a truck", "prompt_index": 1, "class_index": 1,
        "class_name": "truck", "seed": image_seed(0, 5, 0), "attempt": 0, "scores": rows[5]["scores"],
        "sampler": "ddim", "steps": 2, "guidance": 2.0, "negative": "a road", "size": [32, 32], "dtype": "float32",
        "checkpoint": load_stable_diffusion(pristine / "model").fingerprint,
    }  # fmt: skip
    assert list(rows[5]["scores"]) == ["constant"] and not lines(folder / "refused.jsonl")
    stage = json.loads((folder / "stage.json").read_text())
    assert stage["outputs"] == {"images": 10, "refused": {}} and stage["device"].startswith("8 x ")
    assert read_png(folder / "images/im_000005_p1.png").shape == (32, 32, 3)


def test_the_report_shows_the_overview(pristine):
    [(place, section)] = read_run(pristine / "done").sections
    assert section.title == "Images from prompts" and (place / section.image).is_file()


def test_any_image_is_made_again_alone_from_its_line(pristine):
    # the type as a configuration names it: the program is then that of the run
    model = load_stable_diffusion(pristine / "model", dtype=np.dtype("float32"))
    picture = Manifest.read(pristine / "done/images").images[7]
    facts = picture.facts
    config = SamplerConfig(facts["sampler"], facts["steps"], facts["guidance"], facts["negative"])
    image = make_draw(model, config, make_mesh())([picture.prompt], [picture.seed])[0]
    found = read_png(pristine / "done/images" / picture.file)
    assert np.abs(image.astype(int) - found).max() <= 1 and found.std() > 5


def test_the_batch_changes_no_byte(place):
    cli.main(shlex.split("run set.yaml work_dir=again batch=3"))
    skipped = ("stage.json", "config.yaml")
    assert content(Path("again"), *skipped) == content(Path("done"), *skipped)


@pytest.mark.parametrize(
    "lost", [["stage.json"], ["images/im_000003_p1.png"], ["stage.json", "manifest.jsonl", "images/im_000009_p1.png"]]
)
def test_what_was_lost_comes_back_as_it_was(place, lost):
    folder = Path("done/images")
    before, times = content(folder, "stage.json"), {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    for name in lost:
        (folder / name).unlink()
    cli.main(shlex.split("run set.yaml work_dir=done"))
    assert content(folder, "stage.json") == before and (folder / "stage.json").is_file()
    again = {str(path.relative_to(folder)) for path in times if path.stat().st_mtime_ns != times[path]}
    # without the manifest nothing is known of any image
    assert again - {"contact-sheet.png"} == set(lost) - {"stage.json"} or "manifest.jsonl" in lost


def test_images_of_another_checkpoint_are_refused(place, capsys):
    model = load_stable_diffusion("model")
    before = model.fingerprint
    save_stable_diffusion("other", model.with_params({"unet": small_diffusion.unet(UNET, seed=7).params}))
    shutil.rmtree("model")
    with pytest.raises(UserError, match="model/tokenizer: its tokenizer files are gone"):
        save_stable_diffusion("third", model)
    assert not Path("third").exists()
    Path("other").rename("model")
    line = refused(capsys, "run set.yaml work_dir=done")
    after = load_stable_diffusion("model").fingerprint
    assert f"checkpoint: '{before}' -> '{after}'" in line and "choose another folder" in line


def test_another_configuration_is_refused(place, capsys):
    line = refused(capsys, "run set.yaml work_dir=done sample.steps=3")
    assert "done: holds work of another configuration" in line and "choose another work_dir=" in line


def test_more_images_in_other_batches_are_added_to_a_finished_run(place):
    before = content(Path("done/images/images"))
    cli.main(shlex.split("run set.yaml work_dir=done count=13 batch=2 tries=3"))
    after = content(Path("done/images/images"))
    assert len(after) == 13 and {path: after[path] for path in before} == before
    assert len(Manifest.read("done/images")) == 13 and "count: 13" in Path("done/config.yaml").read_text()


def test_a_refused_change_leaves_the_configuration_of_the_run(place, capsys):
    before = Path("done/config.yaml").read_bytes()
    assert "batch: 8 needs about" in refused(capsys, "run set.yaml work_dir=done count=13 device_memory=0.0001")
    assert Path("done/config.yaml").read_bytes() == before


def test_prompts_of_things_are_those_of_datum():
    texts = [prompt.text for prompt in make_prompts(PromptConfig())]
    assert texts == [f"a photo of sks {name}" for name in (
        "traffic lights", "traffic signs", "persons", "riders", "cars", "trucks", "trains", "buses", "motorcycles",
        "bicycles")]  # fmt: skip
    one = make_prompts(PromptConfig(form="a photo of a {token}  {class}", token="", classes=("bus", "car")))
    assert [(p.text, p.class_index, p.class_name) for p in one] == [
        ("a photo of a bus", 0, "bus"), ("a photo of a car", 1, "car")
    ]  # fmt: skip
    assert list(THINGS)[7] == "bus"


def test_prompts_come_from_a_file_or_as_they_are(tmp_path):
    (tmp_path / "prompts.txt").write_text("a wet street\n\n  two cars \n")
    from_file = make_prompts(PromptConfig(file=tmp_path / "prompts.txt"))
    assert [(prompt.text, prompt.class_name) for prompt in from_file] == [("a wet street", None), ("two cars", None)]
    assert [prompt.text for prompt in make_prompts(PromptConfig(texts=("", "{x}")))] == ["", "{x}"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("prompts.classes=[car,tree]", "prompts.classes: 'tree' is not one of traffic light, traffic sign, person"),
        ("prompts.classes=[]", "prompts.classes: names no class; give some, or a file or texts"),
        *((f"'prompts.form=\"a {slot}\"'", f"prompts.form: 'a {slot}' has another slot than {{token}}")
          for slot in ("{thing}", "{}", "{class", "{class.__class__}", "{class[x]}", "{class!r}", "{class:d}")),
        ("prompts.file=empty.txt", "empty.txt holds no prompt; write one on each line"),
        ("prompts.file=nowhere.txt", "nowhere.txt: cannot be read"),
        ("prompts.file=model", "model: cannot be read"),
        ("count=0", "count: expected a whole number >= 1, got '0'"),
        ("sample.size=[33,32]", "size: 33x32 are no multiples of 2 pixels; 32x32 would be"),
        ("prompts.file=empty.txt 'prompts.texts=[a]'", "empty.txt) are set; remove one of them"),
        ("filters.class_presence=0.5 'prompts.texts=[a road]'", "filters.class_presence: the prompts name no class"),
        ("device_memory=-1", "device_memory: expected a number > 0, got '-1'"),
        ("sample.sampler=ddin", "sampler: 'ddin' does not exist; did you mean 'ddim'?"),
        ("sample.steps=1001", "steps: 1001 do not fit into 1000 timesteps"),
        ("sample.steps=0", "sample.steps: expected a whole number >= 1, got '0'"),
        ("sample.guidance=.nan", "sample.guidance: expected a finite number, got '.nan'"),
        ("sample.guidance=1", "negative: 'a road' has no use with a guidance of 1; leave it out"),
        ("filters.clip_score=.nan", "filters.clip_score: expected a finite number, got '.nan'"),
        ("filters.clip_score=0.1 filters.clip=street-clp", "street-clp: no such folder, and no model of the package"),
        ("filters.banned=[a]", "prompts: the filters refuse all 2, such as 'a car' (banned_words: contains 'a')"),
        ("model=nowhere", "nowhere: no such folder"),
        ("mesh=[3,1]", "mesh: data=3 times fsdp=1 is 3, but there are 8 devices"),
        ("device_memory=0.0001", "batch: 8 needs about 0.00 GiB on each of 8 devices, "),
    ],
)  # fmt: skip
def test_faults_are_one_line_before_anything_is_drawn(place, capsys, changes, message):
    (place / "empty.txt").write_text(" \n\n")
    assert message in refused(capsys, f"{RUN} {changes}")


def test_a_long_prompt_is_cut_with_a_warning_or_refused(place, capsys):
    long = "a road " * 20
    options = f"'prompts.texts=[\"{long}\"]' prompts.classes=[] count=1"
    with pytest.warns(UserWarning, match="is longer than the 16 tokens that model reads; lost: '"):
        cli.main(shlex.split(f"{RUN} {options}"))
    assert len(lines(Path("new/images/manifest.jsonl"))) == 1
    line = refused(capsys, f"run set.yaml work_dir=other {options} filters.long_prompt=true")
    assert "prompts: the filters refuse all 1" in line and "tokens, more than 16" in line


def test_scores_are_those_of_the_clip(pristine):
    rows, clip = lines(pristine / "judged/images/manifest.jsonl"), load_clip(pristine / "clip")
    images = np.stack([read_png(path) for path in Manifest.read(pristine / "judged/images").paths[:8]])
    rows = rows[:8]
    assert list(rows[0]["scores"]) == ["constant", "clip_score", "class_presence", "near_duplicate"]
    scores = clip_score(clip, images, [row["prompt"] for row in rows])
    np.testing.assert_allclose([row["scores"]["clip_score"] for row in rows], scores, atol=2e-4)
    shares = grid_share(clip, ["car", "truck"], images)
    assert [row["scores"]["class_presence"] for row in rows] == [shares[j, j % 2] for j in range(8)]
    cosines = embed(clip, images) @ embed(clip, images).T
    nearest = [None, *(pytest.approx(cosines[j, :j].max(), abs=2e-4) for j in range(1, 8))]
    assert [row["scores"]["near_duplicate"] for row in rows] == nearest
    # the filters kept all, so the images are those without filters
    assert images.std() > 5 and {str(p): d for p, d in content(pristine / "judged/images/images").items()} == {
        str(p): d for p, d in content(pristine / "done/images/images").items()
    }


@pytest.mark.parametrize("name", ["clip_score", "class_presence", "near_duplicate"])
def test_filters_refuse_what_they_should(place, name):
    rows = lines(Path("judged/images/manifest.jsonl"))
    scores = [row["scores"][name] for row in rows]
    known = sorted({score for score in scores if score is not None}, reverse=name == "near_duplicate")
    # between the worst and the second: most are kept, and what is drawn in place of the others may be
    threshold = round((known[0] + known[1]) / 2, 6)
    cli.main(shlex.split(f"run set.yaml work_dir=new filters.clip=clip filters.{name}={threshold} tries=100"))
    folder, sign = Path("new/images"), 1 if name == "near_duplicate" else -1
    kept, gone = lines(folder / "manifest.jsonl"), lines(folder / "refused.jsonl")
    assert len(kept) == 10 and gone and {row["filter"] for row in gone} == {name}
    assert all(row["threshold"] == threshold and sign * (row["score"] - threshold) > 0 for row in gone)
    assert all(row["scores"][name] is None or sign * (row["scores"][name] - threshold) <= 0 for row in kept)
    for row, score in zip(kept, scores, strict=True):
        tries = [line for line in gone if line["index"] == row["index"]]
        assert row["attempt"] == len(tries) and row["seed"] == image_seed(0, row["index"], len(tries))
        # the first try is the image that was judged before; later ones also have others beside them
        assert bool(tries) == (score is not None and sign * (score - threshold) > 0) or name == "near_duplicate"
    outputs = json.loads((folder / "stage.json").read_text())["outputs"]
    assert outputs == {"images": 10, "refused": {name: len(gone)}}


def test_shares_are_counted_over_a_grid_against_all_classes(pristine):
    clip = load_clip(pristine / "clip")
    names, image = ["sky", "van"], np.random.default_rng(0).integers(0, 256, (1, 34, 33, 3), np.uint8)
    rivals = ["sky", "van", *(name for name in CLASSES if name != "sky")]
    words = np.asarray(clip.encode_text(clip.tokenize([f"a photo of a {name}." for name in rivals])))
    words = words / np.linalg.norm(words, axis=-1, keepdims=True)
    crops = [image[:, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8] for y in range(4) for x in range(4)]
    best = (embed(clip, np.concatenate(crops)) @ words.T).argmax(-1)
    np.testing.assert_array_equal(grid_share(clip, names, image), [[(best == 0).mean(), (best == 1).mean()]])
    assert len(set(best.tolist())) > 1 and 0 < (best == 0).mean() < 1


@pytest.mark.slow
def test_the_plan_of_the_published_model_is_that_of_the_papers():
    found = plan(Config("CompVis/stable-diffusion-v1-4"))
    assert found.parameters == (("unet", 859_520_964), ("vae", 83_653_863), ("text_encoder", 123_060_480))
    flops = {name: value / 1e12 for name, value in found.flops}
    assert flops["UNet, one call"] == pytest.approx(2 * 0.4016, rel=1e-3)
    assert flops["decoder"] == pytest.approx(2 * 1.257, rel=1e-3)
    assert flops["an image"] == pytest.approx(84.5, rel=1e-3)
    assert any("2975 images: 251.3 PFLOP on one device, 62.82 on each of 4" in note for note in found.notes)
    rows = dict(found.memory)
    assert rows["parameters"] == 4 * (859_520_964 + 83_653_863 + 123_060_480)
    assert rows["1 device, 8 images on each at once"] == rows["parameters"] + rows["activations"]
    assert rows["4 devices, 2 images on each at once"] > rows["8 devices, 1 image on each at once"]
    assert [note.split(":")[0] for note in found.notes[1:3]] == ["80 GB card", "v5e-8 slice"]
    assert found.notes[3] == "prompt 0: a photo of sks traffic lights" and len(found.notes) == 13


@pytest.mark.slow
def test_guidance_size_type_and_shards_are_in_the_plan():
    config = Config("stabilityai/stable-diffusion-2")
    plain = plan(config)
    assert dict(plain.parameters)["text_encoder"] == 340_387_840
    alone = plan(Config(config.model, sample=SamplerConfig(guidance=1.0, steps=20, sampler="ddim", size=(512, 512))))
    flops, less = dict(plain.flops), dict(alone.flops)
    assert flops["an image"] == 102 * flops["UNet, one call"] + flops["decoder"] + flops["text encoder"]
    assert less["an image"] == 20 * less["UNet, one call"] + less["decoder"] + less["text encoder"]
    assert less["UNet, one call"] < flops["UNet, one call"] / 2
    half = dict(plan(Config(config.model, dtype="bfloat16")).memory)
    assert 2 * half["parameters"] == dict(plain.memory)["parameters"]
    parted = dict(plan(Config(config.model, mesh=(1, -1), batch=1)).memory)
    # each device gathers the weights while it computes, and decodes its images after that
    assert parted["parameters"] / 4 < parted["8 devices, 1 image on each at once"]
    assert parted["8 devices, 1 image on each at once"] < parted["1 device, 1 image on each at once"]
    lies = dict(plan(Config(config.model, mesh=(1, -1), batch=1)).shardings)
    assert lies["unet"].startswith("293 of 686 arrays cut in 8, ") and lies["unet"].endswith(
        "of 865,910,724 parameters whole"
    )
    assert set(dict(plain.shardings).values()) == {"whole on every device, as fsdp is 1"}


def test_the_plan_reads_a_folder_and_knows_when_it_does_not_know(place, capsys):
    cli.main(["plan", "set.yaml"])
    out = capsys.readouterr().out
    count = sum(leaf.size for leaf in jax.tree.leaves(load_stable_diffusion("model").unet.params))
    assert f"{count:,}" in out and "10 images of 2 prompts by " in out and "prompt 1: a truck" in out
    cli.main(["plan", "set.yaml", "model=street-difusion"])
    assert "not in the catalogue; did you mean 'street-diffusion'?" in capsys.readouterr().out
    for model in ("runs/some/export/200", "owner/name"):
        cli.main(["plan", "set.yaml", f"model={model}"])
        out = capsys.readouterr().out
        assert f"no sizes are known: model: '{model}' is no folder and not in the catalogue" in out
        assert "GFLOP" not in out and "prompt 1: a truck" in out
    Path("model/vae/config.json").unlink()
    message = "model/vae/config.json: no such file"
    assert message in refused(capsys, "plan set.yaml") and message not in capsys.readouterr().out
    assert "size: 33x32 are no multiples of 64 pixels" in refused(
        capsys, "plan set.yaml model=CompVis/stable-diffusion-v1-4 sample.size=[33,32]"
    )


def test_a_device_that_is_too_small_is_told_by_how_much():
    config = Config("CompVis/stable-diffusion-v1-4", batch=64, device_memory=16)
    shapes = read_networks(config.model)
    with pytest.raises(UserError, match="batch: 64 needs about") as caught:
        check_memory(config, shapes, 4, 1)
    need = sum(memory(config, shapes, 16, 1).values()) / 2**30
    assert f"{need:.2f} GiB on each of 4 devices, {need - 16:.2f} GiB more than the 16.00 GiB there" in str(
        caught.value
    )
    fitting = int(str(caught.value).split("batch=")[1].split()[0])
    assert fitting % 4 == 0 and sum(memory(config, shapes, fitting // 4, 1).values()) <= 16 * 2**30
    assert sum(memory(config, shapes, fitting // 4 + 1, 1).values()) > 16 * 2**30
    check_memory(Config(config.model, batch=fitting, device_memory=16), shapes, 4, 1)
    with pytest.raises(UserError, match="not even one image fits"):
        check_memory(Config(config.model, batch=1, device_memory=3), shapes, 1, 1)


def test_images_that_were_judged_otherwise_are_never_mixed(place):
    config, model, before = open_run("set.yaml").config, load_stable_diffusion("model"), content(place)
    for changes, what in ({"filters": FilterConfig("clip", near_duplicate=0.99)}, "filters"), ({"seed": 1}, "seed"):
        with pytest.raises(UserError, match=f"done/images: holds work of another configuration .*{what}"):
            draw_images(replace(config, **changes), model, Path("done/images"))
    assert content(place) == before


@pytest.mark.parametrize(
    ("name", "count"), [pytest.param("generate-sd14-things", 2975, marks=pytest.mark.slow), ("generate-street", 200)]
)
def test_published_configurations_open(name, count):
    run = open_run(Path(__file__).parents[2] / f"configs/datum/{name}.yaml")
    assert [stage.name for stage in run.stages()] == ["images"] and run.config.count == count
    found = run.plan()
    assert f"images  {count} images of 10 prompts by {run.config.model}" in " ".join(found.text().split(" " * 30))
    published = run.config.sample == SamplerConfig(size=(512, 512))
    assert published == (name == "generate-sd14-things") and len(make_prompts(run.config.prompts)) == 10
    if published:
        assert [count for _, count in found.parameters] == [859_520_964, 83_653_863, 123_060_480]


@pytest.mark.slow
def test_stable_diffusion_2_is_planned_at_full_size_with_its_file_of_prompts(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    run = open_run("configs/datum/generate-sd2.yaml")
    found = run.plan()
    assert dict(found.parameters) == {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}
    assert len(make_prompts(run.config.prompts)) == 24
    text = found.text()
    assert "80 GB card: " in text and "v5e-8 slice: " in text and "does not fit" not in text


def test_a_judge_that_is_silent_leaves_the_images_to_the_clip(place, capsys):
    judge = "'filters.judge={url: http://127.0.0.1:1/v1, model: eyes, tries: 1}'"
    cli.main(shlex.split(f"{RUN} {CLIP} {judge} filters.unclipped=0.0 filters.textured=0.0"))
    assert capsys.readouterr().err.count("warning: no verdict of the vision-language judge (127.0.0.1:1: no conn") == 1
    rows, before = lines(Path("new/images/manifest.jsonl")), lines(Path("judged/images/manifest.jsonl"))
    assert [row["scores"] for row in rows] == [
        row["scores"] | {"vision_judge": None} | {name: here["scores"][name] for name in ("unclipped", "textured")}
        for row, here in zip(before, rows, strict=True)
    ]
    outputs = json.loads(Path("new/images/stage.json").read_text())["outputs"]
    assert outputs["without_verdict"] == 10
    assert "; 10 judged by the CLIP" in json.loads(Path("new/images/sections.json").read_text())[0]["text"]
    line = refused(capsys, f"run set.yaml work_dir=other {judge}")
    assert "filters.judge: set filters.clip_score or filters.class_presence too" in line
    line = refused(capsys, f"run set.yaml work_dir=other {CLIP} 'filters.judge={{url: http://a:b@c, model: eyes}}'")
    assert "filters.judge.url: holds credentials" in line and "a:b" not in line


def test_refused_prompts_are_in_the_report(place):
    cli.main(shlex.split(f"{RUN} 'prompts.texts=[a red bus, a red bus now, a car]' filters.similar_prompt=0.7"))
    (row,) = lines(Path("new/images/refused.jsonl"))
    assert (row["filter"], row["score"], row["why"]) == ("similar_prompt", 0.75, "similar to 'a red bus'")
    text = json.loads(Path("new/images/sections.json").read_text())[0]["text"]
    assert text.startswith("10 images by ") and "; prompts refused: 1 by similar_prompt; refused and generated" in text

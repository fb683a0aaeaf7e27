"""The verbs of the command line: their docstrings are its help. A method is imported when its verb runs.

Results go to stdout, logs and progress to stderr.
"""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from fmda.environment import check_precision, keep_compiled_programs, keep_freed_memory
from fmda.errors import UserError, did_you_mean
from fmda.places import assets_folder
from fmda.progress import process_index

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Json = Annotated[Flag, tyro.conf.arg(name="json", help="print JSON")]
Config = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="a YAML file of `configs/`")]
Overrides = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[KEY=VALUE ...]")]
ProtocolKeys = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY=VALUE ...]")]
Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="a folder, an embedded model or a hub id")]
Revision = Annotated[str | None, tyro.conf.arg(help="branch, tag or commit of a hub id")]


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_outcome(work_dir: Path, last: Path) -> None:
    """Prints what came out of a run, and a path as the last line; of several processes the first one does."""
    from fmda.evaluate.summary import outcome

    if process_index() == 0:
        print("\n".join([*outcome(work_dir), str(last)]))


def _load_jax() -> None:
    """Loads jax, which takes seconds: says so first at a terminal, and lets it keep compiled programs and memory.

    Raises UserError for an environment in which jax computes in 64 bits.
    """
    check_precision()
    if "jax" not in sys.modules and sys.stderr.isatty():
        _log("loading jax ...")
    keep_compiled_programs()
    keep_freed_memory()


def demo(work_dir: Path = Path("runs/demo"), overrides: Overrides = ()) -> None:
    """Run the whole system on the embedded default: render streets, rank templates, adapt to one image, report.

    Five minutes on two CPU cores. Ends with the path of an HTML report.

    Args:
        work_dir: the run folder; run again to continue an interrupted demo.
        overrides: values to change, as key.sub=value.
    """
    _load_jax()
    from fmda.methods.kinds import open_run

    recipe = assets_folder() / "demo.yaml"
    job = open_run(recipe, [f"work_dir={work_dir}", *overrides])
    folders = job.execute(_log)
    _print_outcome(job.work_dir, folders["report"] / "report.html")


def run(config: Config, overrides: Overrides = (), processes: Flag = False) -> None:
    """Run a configuration: its stages in order; finished ones are skipped, interrupted ones resume.

    Args:
        overrides: values to change, as key.sub=value; work_dir= names the run folder.
        processes: join the other processes of this run (coordinator from the cluster or FMDA_COORDINATOR,
            FMDA_PROCESSES, FMDA_PROCESS) before starting.
    """
    _load_jax()
    from fmda.methods.kinds import open_run

    if processes:
        from fmda.mesh import start_processes

        start_processes()
    job = open_run(config, overrides)
    job.execute(_log)
    _print_outcome(job.work_dir, job.work_dir)


def plan(config: Config, overrides: Overrides = (), as_json: Json = False) -> None:
    """Dry run: print resolved values, stages, parameters, FLOPs and bytes; write nothing.

    Args:
        overrides: values to change, as key.sub=value.
    """
    _load_jax()
    from fmda.config import to_dict, to_yaml
    from fmda.methods.kinds import open_run

    job = open_run(config, overrides)
    planned = job.plan()
    if as_json:
        print(json.dumps({"kind": job.kind, "config": to_dict(job.config), "plan": to_dict(planned)}, indent=1))
    else:
        print(f"kind: {job.kind}\n{to_yaml(job.config)}\n{planned.text()}")


def predict(
    model: Positional[Path],
    images: Positional[tuple[Path, ...]],
    out: Path = Path("predictions"),
    protocol: ProtocolKeys = (),
    as_json: Json = False,
) -> None:
    """Segment images with a trained run or a checkpoint: writes a label map and an overlay for each.

    Args:
        model: a run folder, or the folder or weight file of a segmentation network.
        images: image files or folders of images.
        out: where to write `<name>.png` and `<name>_overlay.jpg`; the same command resumes, and no other existing file
            is replaced.
        protocol: how a network sees images, e.g. size=[512,1024], scale=1.25, crop=512 stride=341, flip=true.
    """
    if not images:
        raise UserError("predict: no image named; give image files or folders of images after the model")
    _load_jax()
    from fmda.evaluate import Segmenter
    from fmda.evaluate.predict import predict_files
    from fmda.evaluate.protocol import parse_protocol

    segmenter = Segmenter.load(model, protocol=parse_protocol(protocol))
    for record in predict_files(segmenter, images, out):
        print(json.dumps(record) if as_json else record["labels"])


def evaluate(
    model: Positional[Path],
    dataset: Positional[str],
    root: Path | None = None,
    split: str = "val",
    class_map: str | None = None,
    protocol: ProtocolKeys = (),
    out: Path | None = None,
    as_json: Json = False,
) -> None:
    """Score a run or a checkpoint on a labelled dataset: IoU by class, mIoU, figures.

    Args:
        model: a run folder, or the folder or weight file of a segmentation network.
        dataset: a known dataset (`fmda data list`).
        root: its folder; default: where `fmda data list` looks for it.
        split: which part.
        class_map: a known map or YAML file between the model's classes and the dataset's.
        protocol: how a network sees images, e.g. size=[512,1024], scale=1.25, crop=512 stride=341, flip=true.
        out: where scores, table and figures go; default: `<run>/evaluate-<dataset>-<split>`, of a network
            `runs/<network>/evaluate-<dataset>-<split>`.
    """
    _load_jax()
    from fmda.data import open_dataset
    from fmda.evaluate import Segmenter, evaluate_dataset
    from fmda.evaluate.protocol import parse_protocol
    from fmda.evaluate.segmenter import checkpoint_name, is_checkpoint

    examples = open_dataset(dataset, root, split)
    home = Path("runs") / checkpoint_name(model) if is_checkpoint(model) else model
    out = out or home / f"evaluate-{dataset}-{split}"
    segmenter = Segmenter.load(model, protocol=parse_protocol(protocol))
    scores = evaluate_dataset(segmenter, examples, class_map=class_map, out=out)
    print(json.dumps(scores.to_json()) if as_json else scores.table())


def data_list(as_json: Json = False) -> None:
    """List the known datasets (classes, splits, expected layout), class lists and class maps."""
    from fmda.data import class_list, known_class_lists, known_class_maps, known_datasets
    from fmda.data.classes import LIST_FORM, MAP_FORM

    rows = known_datasets()
    lists = {name: len(class_list(name)) for name in known_class_lists()}
    if as_json:
        known = {"datasets": rows, "class_lists": lists, "class_maps": known_class_maps()}
        print(json.dumps(known, indent=1, default=str))
        return
    for row in rows:
        print(f"{row['name']:<18}{row['classes']:>4} classes  splits {', '.join(row['splits'])}")
        print(f"{'':<18}{row['layout']}" + (f" ({row['note']})" if row["note"] else ""))
    print(f"\nclass lists, for classes=: {', '.join(f'{name} ({count})' for name, count in lists.items())}")
    print(f"or a YAML file; a folder's own is its classes.yaml:\n{LIST_FORM}")
    print(f"class maps, for class_map=: {', '.join(known_class_maps())}\nor a YAML file:\n{MAP_FORM}", end="")


def data_check(dataset: Positional[str], root: Path | None = None, split: str = "val", as_json: Json = False) -> None:
    """Examine a dataset before a run: pairs, files, sizes, label values; counts pixels by class.

    Exit code 2 on any fault. Images without labels remain usable as unlabelled images, which the last line reports.

    Args:
        dataset: a known dataset, or `folder`.
        root: its folder.
        split: which part.
    """
    from fmda.data import open_dataset
    from fmda.data.check import check

    report = check(open_dataset(dataset, root, split, strict=False))
    print(json.dumps(report.to_json()) if as_json else report.text())
    if report.faults:
        raise UserError(f"{dataset}: {len(report.faults)} faults, listed above; fix or remove those files")


def data_render(out: Positional[Path], overrides: Overrides = ()) -> None:
    """Render street-world datasets, one folder per domain, with labels, instances, captions, a contact sheet.

    Args:
        out: the folder to fill; run again to continue.
        overrides: values to change, as key=value, e.g. domains='{night: 100}' height=256 width=512 seed=3.
    """
    _load_jax()
    from fmda.config import from_dict, override
    from fmda.methods.render import RenderConfig, write_world

    config = from_dict(RenderConfig, override({}, overrides), "fmda data render")
    write_world(config, out)
    print(out / "contact-sheet.png")


def models_list(as_json: Json = False) -> None:
    """List the known networks: parameters, where weights come from, licence; and the models of the package."""
    from fmda.models.catalog import CATALOG
    from fmda.weights.source import asset_names

    for name, entry in CATALOG.items():
        facts = {"name": name, "parameters": entry.parameters, "source": entry.source, "licence": entry.licence}
        print(json.dumps(facts) if as_json else f"{name:<28}{entry.parameters:>14,}  {entry.source:<40}{entry.licence}")
    for name in asset_names():
        facts = {"name": name, "source": name}
        print(json.dumps(facts) if as_json else f"{name:<28}{'':>14}  in the package")


def models_check(source: Source, revision: Revision = None, as_json: Json = False) -> None:
    """Load a checkpoint and verify every array: names, shapes, numbers, count.

    A whole Stable Diffusion, or one network: CLIP, DINO or another encoder, a segmentation network, UNet, autoencoder,
    text encoder; or the two ONNX graphs of a SAM. Exit code 2 when anything is wrong.
    """
    if any(Path(source).glob("*.onnx")):
        from fmda.sam.check import verify_graphs

        graphs = verify_graphs(source)
        print(json.dumps(graphs.to_json()) if as_json else graphs.text())
        return
    _load_jax()
    from fmda.diffusion.checkpoints import verify

    report = verify(source, revision)
    print(json.dumps(report.to_json()) if as_json else report.text())
    if not report.ok:
        raise UserError(f"{source}: {report.file}: not fit for use, see above; copy or download it again")


def convert(
    source: Source,
    out: Positional[Path],
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    revision: Revision = None,
) -> None:
    """Rewrite a checkpoint (Flax msgpack, safetensors, OpenCLIP names) as safetensors that PyTorch's libraries open.

    A whole Stable Diffusion, or one network: CLIP, DINO or another encoder, a segmentation network, UNet, autoencoder,
    text encoder.

    Args:
        out: a new folder.
        dtype: storage type.
    """
    _load_jax()
    from fmda.diffusion.checkpoints import convert as convert_checkpoint

    print(convert_checkpoint(source, out, dtype, revision))


def export_sam(source: Source, out: Positional[Path], revision: Revision = None, as_json: Json = False) -> None:
    """Write a Segment Anything checkpoint as two ONNX graphs, for any size of image and any number of prompts.

    Both graphs are run on images of three sizes and compared with JAX first. Needs the extra `export`.

    Args:
        out: a new folder for encoder.onnx and decoder.onnx.
    """
    _load_jax()
    from fmda.weights.sam_export import export_sam as export

    for comparison in export(source, out, revision):
        print(json.dumps(asdict(comparison)) if as_json else comparison)
    if not as_json:
        print(out)


def bench(name: Positional[str] = "", out: Path | None = None, arguments: Positional[tuple[str, ...]] = ()) -> None:
    """Run a benchmark of `benchmarks/` by name; without a name, list them. Needs a checkout.

    Args:
        name: a benchmark.
        out: where to write the JSON; default: stdout alone.
        arguments: passed on to the benchmark.
    """
    folder = Path(__file__).parent.parent / "benchmarks"
    known = sorted(p.stem for p in folder.glob("*.py"))
    if not name:
        print("\n".join(known))
        return
    if name not in known:
        raise UserError(f"benchmark '{name}' is unknown{did_you_mean(name, known)}")
    if out:
        # before the measurement, which may take an hour
        from fmda.atomic import check_writable

        check_writable(out)
    script = str(folder / f"{name}.py")
    sys.path.insert(0, str(folder))
    sys.argv = [script, *arguments, *(["--out", str(out)] if out else [])]
    runpy.run_path(script, run_name="__main__")


def report(runs: Positional[tuple[Path, ...]], out: Path = Path("report.html")) -> None:
    """Write one HTML page, readable without network, over one or several run folders.

    Args:
        runs: run folders; the first is the one the others are compared with.
        out: the page.
    """
    from fmda.evaluate.report import report as write_report

    print(write_report(list(runs), out))


VERBS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "run": run,
    "plan": plan,
    "predict": predict,
    "evaluate": evaluate,
    "data list": data_list,
    "data check": data_check,
    "data render": data_render,
    "models list": models_list,
    "models check": models_check,
    "convert": convert,
    "export-sam": export_sam,
    "bench": bench,
    "report": report,
}

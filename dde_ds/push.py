"""``dde-ds push``: upload an export to a repository of the Hugging Face hub, with a complete model card.

Nothing goes to the hub unless this command is called.
"""

from __future__ import annotations

import contextlib
import html
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dde_ds import __version__
from dde_ds.errors import UserError, nearest
from dde_ds.text import printable
from dde_ds.untrusted import open_regular, read_regular

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

CARD = "README.md"
CARD_BYTES = 2**20
PICTURES = "samples"
"""The repository's folder for the pictures of the card."""
PNG = b"\x89PNG\r\n\x1a\n"
# What a user can do about the hub's answers, by status code.
MENDS = {
    401: "the token was not accepted: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token needs write access to the repositories of this owner",
    404: "no such owner, repository or branch, or none that the token may see",
    409: "something else was changed there at the same time: push again",
}
AGAIN = "push again: what has arrived is not sent twice"


def push(
    folder: Path,
    repo: str,
    *,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    comparison: Path | None = None,
    model: str | None = None,
    pictures: int = 4,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> None:
    """Upload an export and its model card. The export stays as it is, because the card is completed in a copy.

    Args:
        folder: an export, or a run folder with one.
        repo: ``OWNER/NAME``, made if it is not there. Files of the repository that are not in the export stay.
        comparison: a comparison of ``dde-ds evaluate``. All of its results for the export go into the card.
        model: the export's name in the comparison.
        pictures: how many prompts of the comparison are shown, chosen at random; 0 shows none. Without a comparison, the card
            shows drawings that the run made.
        private: refuse a repository that others can see.

    Raises:
        UserError: there is no export or no token, an option is impossible, or the hub is not reached or refuses.
    """
    if not re.fullmatch("[^/]+/[^/]+", repo):
        raise UserError(f"repository {repo}: expected OWNER/NAME")
    for what, value in [("repository", repo), ("base_model", base_model), *(("datasets", name) for name in datasets)]:
        if value is not None and (problem := _id_problem(value)):
            raise UserError(f"{what} {value}: {problem}")
    for what, value in (("branch", branch), ("message", message)):
        if value is not None and not value.strip():
            raise UserError(f"{what}: is empty; leave it out, or say one")
    if pictures < 0:
        raise UserError(f"pictures {pictures}: must be 0 or more")
    if model and not comparison:
        raise UserError(f"model {model}: names a model of a comparison; give the comparison too")
    export = find_export(folder)
    files = list_files(export)
    card = _read_card(export)
    _complete(card, license, license_name, license_link, base_model, datasets, tags, is_whole="model_index.json" in files)
    if comparison:
        shown = _add_comparison(card, export, repo, comparison, model, pictures)
    else:
        shown = _add_drawings(card, export, folder) if pictures else {}
    if taken := sorted(files.keys() & shown.keys()):
        raise UserError(f"{export}: holds {taken[0]} already, where a picture of the card would go; show none, or move it")
    files |= shown
    if dry_run:
        print(printable_lines(str(card)))
        print("\n".join(f"{path.stat().st_size:>14,}  {printable(name)}" for name, path in sorted(files.items())))
        print(f"{len(files) + 1} files with the card {CARD}; nothing was uploaded")
        return
    url = _upload(card, files, repo, private, branch, message or f"Push a model aligned by dde_ds {__version__}")
    print(printable(f"{len(files) + 1} files: {url}"))


def find_export(folder: Path) -> Path:
    """Return the folder itself, or the ``export/`` of a run folder.

    Raises:
        UserError: neither folder holds a pipeline or adapters.
    """
    from dde_ds.engine.export import LORA_FILE

    if folder.is_file():
        raise UserError(f"{folder}: is one file; push a folder: dde-ds export with --format folder or lora")
    for place in (folder, folder / "export"):
        if any((place / name).is_file() for name in ("model_index.json", LORA_FILE)):
            return place
    raise UserError(f"{folder}: no export there: no model_index.json, and no {LORA_FILE}; make one with dde-ds export")


def list_files(export: Path) -> dict[str, Path]:
    """Return the export's files by their names in the repository, without the card and without hidden ones.

    Raises:
        UserError: the export holds something that is no regular file. A link might lead to a file that nobody wants to publish.
    """
    files, hidden = {}, 0
    for path in sorted(export.rglob("*")):
        name = path.relative_to(export)
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: neither a regular file nor a folder; put there what is to be uploaded, or delete it")
        if path.is_file() and any(part.startswith(".") for part in name.parts):
            hidden += 1
        elif path.is_file() and str(name) != CARD:
            files[name.as_posix()] = path
    if hidden:
        print(f"{export}: {hidden} files whose names begin with a dot are left out", file=sys.stderr)
    return files


def printable_lines(text: str) -> str:
    """Return a text of several lines, in which everything that could control a terminal is escaped."""
    return "\n".join(map(printable, text.split("\n")))


def _id_problem(name: str) -> str | None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return " ".join(str(error).split())
    return None


def _read_card(export: Path) -> ModelCard:
    import yaml
    from huggingface_hub import ModelCard

    try:
        return ModelCard(read_regular(export / CARD, CARD_BYTES).decode())
    except FileNotFoundError:
        raise UserError(f"{export}: no {CARD} there, which says how the model was made; dde-ds export writes it") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{export / CARD}: not a model card: {' '.join(str(error).split())}") from None


def _complete(
    card: ModelCard,
    license: str | None,
    license_name: str | None,
    license_link: str | None,
    base_model: str | None,
    datasets: Sequence[str],
    tags: Sequence[str],
    is_whole: bool,
) -> None:
    """Fill in the head of the card. A value of the export's own card stays unless another one is given."""
    data = card.data
    data["license"] = license or data.get("license")
    if not data["license"]:
        raise UserError(
            "license: say under which licence the model may be used, by its id on the hub; it is the base's: openrail++ for SDXL, "
            "creativeml-openrail-m for Stable Diffusion 1.5"
        )
    if (license_name or license_link) and data["license"] != "other":
        raise UserError(f"license {data['license']}: has a name and a link already; those go with the licence other")
    data["license_name"] = license_name or data.get("license_name")
    data["license_link"] = license_link or data.get("license_link")
    data["base_model"] = base_model or data.get("base_model")
    if data["base_model"]:
        data["base_model_relation"] = "finetune" if is_whole else "adapter"
    data["datasets"] = list(datasets) or data.get("datasets")
    data["library_name"] = data.get("library_name", "diffusers")
    data["pipeline_tag"] = data.get("pipeline_tag", "text-to-image")
    data["tags"] = list(dict.fromkeys([*data.get("tags", []), *tags]))


def _add_comparison(card: ModelCard, export: Path, repo: str, source: Path, asked: str | None, pictures: int) -> dict[str, Path]:
    """Write a comparison's results into the head and the text of the card. Return the pictures by their names in the repository."""
    from dde_ds.evaluation.comparison import COLUMNS, SET_COLUMNS, cells, read_comparison, set_cells, title

    data = read_comparison(source)
    base, names = data["base"], [name for name in data["folders"] if name != data["base"]]
    if asked and asked not in names:
        raise UserError(f"model {asked}: not in {source}{nearest(asked, names)}")
    if not asked and len(names) != 1:
        raise UserError(f"model: {source} compares {', '.join(names) or 'nothing'}; say which of them the export is")
    model = asked or names[0]
    _require_same_weights(export, source, model, data["settings"][model])
    card.data["model_name"] = repo.partition("/")[2]
    card.data["eval_results"] = list(eval_results(data, model))
    lines = [
        "",
        "## Evaluation",
        "",
        _plain(title(len(data["prompts"]), _images(data), base)) + ". Intervals are 95 % bootstraps over prompts.",
    ]
    rows = [cells(row) for row in data["results"] if row["model"] == model]
    sets = [set_cells(row) for row in data["sets"] if row["model"] in (base, model)]
    for columns, table_rows in ((COLUMNS, rows), (SET_COLUMNS, sets)):
        lines += ["", *_table(columns, table_rows)] if table_rows else []
    lines += ["", *(f"- {_plain(note)}" for note in data["notes"])]
    shown = {}
    if pictures:
        shown, drawn = _side_by_side(data, source if source.is_dir() else source.parent, model, pictures)
        lines += ["", "## Samples", "", "Prompts chosen at random; both images of a row are drawn from the same noise.", "", *drawn]
    card.text = card.text.rstrip("\n") + "\n" + "\n".join(lines).rstrip("\n") + "\n"
    return shown


def eval_results(data: dict[str, Any], model: str) -> Iterator[EvalResult]:
    """Yield all results of a model in a comparison's data, in the hub's format.

    For each scorer, there are two results: how often the model beats the base, and the model's mean score. The scores of whole sets
    of images follow.
    """
    from huggingface_hub import EvalResult

    from dde_ds.evaluation.comparison import title

    base, prompts, images = data["base"], len(data["prompts"]), _images(data)
    interval = {"interval": "95 % bootstrap over prompts"}
    counts = {"base": base, "prompts": prompts, "images_per_prompt": images, "comparisons": prompts * images}

    def result(scorer: str, kind: str, name: str, value: float, args: dict[str, Any]) -> EvalResult:
        scorer_is = {"scorer": scorer, "scorer_sha256": data["scorers"].get(scorer)}
        return EvalResult(
            task_type="text-to-image",
            task_name="Text to image",
            dataset_type="prompts",
            dataset_name=title(prompts, images, base),
            metric_type=kind,
            metric_name=name,
            metric_value=value,
            metric_args=scorer_is | args,
        )

    for row in data["results"]:
        if row["model"] == model:
            scorer, beats = row["scorer"], row["beats"]
            yield result(
                scorer,
                "win_rate",
                f"{scorer}: beats {base}, ties half",
                beats["rate"],
                {"low": beats["low"], "high": beats["high"]} | interval | counts,
            )
            yield result(
                scorer,
                "mean_score",
                f"{scorer}: mean score",
                row["model_mean"],
                {"base_mean": row["base_mean"], "difference": dict(row["difference"])} | interval | counts,
            )
    for row in data["sets"]:
        if row["model"] == model:
            values = {key: row[key] for key in ("deviation", "splits", "count")}
            yield result(row["scorer"], "set_score", f"{row['scorer']} of all images", row["mean"], values)


def _require_same_weights(export: Path, source: Path, model: str, settings: dict[str, Any]) -> None:
    """Refuse the results of another model.

    Adapters alone are not checked, because the images were drawn by a pipeline into which the adapters are merged.
    """
    if not (export / "model_index.json").is_file():
        return
    from dde_ds.evaluation.generate import load_pipeline
    from dde_ds.evaluation.generate_folder import weights_digest
    from dde_ds.models.silence import silence_libraries

    silence_libraries()
    if weights_digest(load_pipeline(str(export))) != settings.get("weights"):
        raise UserError(
            f"comparison {source}: {model} was drawn by other weights than those in {export}, perhaps of another precision; "
            "push the folder that was evaluated, or evaluate this one"
        )


def _side_by_side(data: dict[str, Any], folder: Path, model: str, count: int) -> tuple[dict[str, Path], list[str]]:
    """Return pictures by their names in the repository, and the table that shows them."""
    import torch

    from dde_ds.report.comparison import choose

    shown, rows = {}, []
    for prompt, image in choose(torch.zeros(len(data["prompts"]), _images(data)), count)[2]:
        row = [_plain(data["prompts"][prompt])]
        for side, name in (("base", data["base"]), ("model", model)):
            target = f"{PICTURES}/{prompt:05d}-{image:02d}-{side}.png"
            shown[target] = _require_png(folder / data["folders"][name] / "images" / f"{prompt:05d}-{image:02d}.png")
            row.append(f"![{side}]({target})")
        rows.append(row)
    return shown, _table(("prompt", data["base"], model), rows, escape=False)


def _add_drawings(card: ModelCard, export: Path, folder: Path) -> dict[str, Path]:
    """Show the first and the last drawing of the export's run in the card, if there are any.

    Return the pictures by their names in the repository.
    """
    from dde_ds.config import load_config

    run = folder if export != folder else export.resolve().parent
    paths = sorted(path for path in (run / "samples").glob("step-*.png") if re.fullmatch("step-[0-9]{8,}", path.stem))
    if not paths:
        return {}
    shown = {f"{PICTURES}/{path.name}": _require_png(path) for path in dict.fromkeys((paths[0], paths[-1]))}
    lines = ["", "## Samples", "", "Drawn during training, from the same noise each time."]
    with contextlib.suppress(UserError):  # without a readable configuration, the prompts are left out
        if prompts := load_config(run / "config.yaml").samples.prompts:
            lines[-1] += f" From left to right: {_plain('; '.join(prompts))}."
    for name in shown:
        step = int(Path(name).stem.removeprefix("step-"))
        lines += ["", f"Step {step}:" if step else "Before training:", "", f"![step {step}]({name})"]
    card.text = card.text.rstrip("\n") + "\n" + "\n".join(lines) + "\n"
    return shown


def _require_png(path: Path) -> Path:
    try:
        with open_regular(path) as file:
            if file.read(len(PNG)) == PNG:
                return path
        problem = "not a PNG file"
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    raise UserError(f"{path}: {problem.lower()}; the card would show this picture: draw it again, or show none with pictures 0")


def _images(data: dict[str, Any]) -> int:
    return data["settings"][data["base"]]["images_per_prompt"]


def _plain(text: str) -> str:
    """Return text that Markdown shows letter by letter, on one line."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(printable(" ".join(text.split())), quote=False))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], escape: bool = True) -> list[str]:
    lines = [[_plain(column) for column in columns], ["---"] * len(columns)]
    lines += [[_plain(cell) for cell in row] if escape else list(row) for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _upload(card: ModelCard, files: dict[str, Path], repo: str, private: bool, branch: str | None, message: str) -> str:
    """Upload the files and the card. Return the address of the commit.

    Raises:
        UserError: there is no token, the repository is public but must be private, or the upload failed.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # the library's warnings of retries hold signed addresses
    if not sys.stderr.isatty():
        disable_progress_bars()
    token = None
    try:
        token = get_token()
        if not token:
            raise UserError("no token of the Hugging Face hub: log in with `hf auth login`, or set HF_TOKEN")
        if not re.fullmatch("[!-~]+", token):
            raise UserError("the token of the Hugging Face hub holds characters that no token has: log in again, or set HF_TOKEN")
        api = HfApi(token=token, library_name="dde_ds", library_version=__version__)
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UserError(f"push {repo}: is there and is public, nothing was uploaded; make it private, or take another name")
        if branch:
            api.create_branch(repo, branch=branch, exist_ok=True)
        with tempfile.TemporaryDirectory() as staging:
            # Use links, so that an export of some gigabytes is not copied for the sake of a card.
            for name, path in files.items():
                place = Path(staging, name)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(path.resolve())
            Path(staging, CARD).write_text(str(card), encoding="utf-8")
            return api.upload_folder(repo_id=repo, folder_path=staging, revision=branch, commit_message=message).commit_url
    except UserError:
        raise
    except Exception as error:  # the library, its transfer threads and the server's answers may raise anything
        text = _told(error).replace(token, "***") if token else _told(error)
        raise UserError(f"push {repo}: {text}") from None


def _told(error: BaseException) -> str:
    """Return what went wrong, in the words of the server or else of the innermost cause, and what to do about it."""
    from huggingface_hub.errors import HfHubHTTPError

    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            said = _short(cause.server_message or cause.response.reason_phrase)
            return f"refused by {cause.response.url.host}: {status} {said}; {MENDS.get(status, AGAIN)}"
    return f"broke off: {type(causes[-1]).__name__}: {_short(str(causes[-1]))}; {AGAIN}"


def _short(text: str) -> str:
    return " ".join(text.split())[:300]

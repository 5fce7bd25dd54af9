# SPDX-License-Identifier: Apache-2.0
"""``verify``: a recipe's model under CP against AutoModel's own on one rank, on this machine.

Or its kernels against the torch path.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
import yaml
from rich.console import Console

from nemo_dsv4_cp.cli.output import check_outputs, emit, running, table, warn
from nemo_dsv4_cp.tools.recipes import check_context_parallel
from nemo_dsv4_cp.tools.sizes import complete_fields

if TYPE_CHECKING:  # AutoModel takes seconds to import
    from nemo_dsv4_cp.checks.difference import Difference

_SHOWN = 8


def verify(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", dir_okay=False)],
    ranks: Annotated[
        int | None,
        typer.Option(help="CP ranks on this machine; by default the recipe's, 4 at most.", min=1),
    ] = None,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Compare the kernels alone, at the model's full sizes."),
    ] = False,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write every difference here.")
    ] = None,
) -> None:
    """Shrink a recipe's model and compare a training step with AutoModel's own on one rank.

    Both start from the same weights and train on the same two microbatches in float32, with the
    recipe's loss, auxiliary loss, gate bias update and activation checkpointing, on this machine's
    GPUs if there is one per rank and on CPU processes otherwise. Prints the largest differences and
    what of the recipe was left out. With --kernels it compares every kernel that the recipe names
    (auto: triton) with the torch path instead, on one GPU, in the recipe's dtype and at its model's
    own sizes.

    Example: nemo-dsv4-cp verify recipe.yaml

    Exit status: 0 if all tensors agree, 1 if one does not or a rank failed, 2 for a mistake in the
    arguments or the recipe.
    """
    check_outputs(json_=json_)
    fields, config, cp_size, packed = _read(recipe)
    if kernels:
        of_model = (fields["model"].get("torch_dtype"), *map(config.get, ("torch_dtype", "dtype")))
        named = next(filter(None, of_model), "bfloat16")
        _verify_kernels(recipe, config, str(named).split(".")[-1], json_)
        return
    if ranks is None:
        ranks = min(cp_size, 4, max(os.cpu_count() or 1, 2))
    with running(f"{recipe}: ", mistakes=(ImportError, TypeError, ValueError)):
        from nemo_dsv4_cp.tools.verification import verify as run

        with Console(stderr=True).status(f"Running on 1 and on {ranks} ranks"):
            found = run(fields, config, cp_size=ranks, packed=packed)
    what = "packed documents" if packed else "one document per row"
    _report(
        f"{recipe.name}, shrunk: CP={ranks} against CP=1, float32, {what}",
        found.differences,
        json_,
        kind="tensors",
        advice="Do not train with this set-up; transport: all_gather shows whether it is the "
        "transport's.",
        left_out=found.left_out,
    )


def _verify_kernels(recipe: Path, config: dict[str, Any], dtype: str, json_: Path | None) -> None:
    """Compare the kernels that a recipe names with the torch path."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{recipe}: torch_dtype {dtype} is no dtype of activations")
    with running(f"{recipe}: ", mistakes=(ImportError, TypeError, ValueError)):
        from nemo_dsv4_cp.checks import certificate
        from nemo_dsv4_cp.checks.difference import Difference
        from nemo_dsv4_cp.checks.kernel_verification import verify_kernels
        from nemo_dsv4_cp.options import AUTO, ContextParallelOptions
        from nemo_dsv4_cp.tools.verified_models import kernel_sizes

        options = ContextParallelOptions.from_block(config.get("context_parallel"))
        on_gpu = torch.cuda.is_available()
        if options.kernels == AUTO and not (on_gpu or os.environ.get("TRITON_INTERPRET")):
            raise ValueError(
                "--kernels compares triton (kernels: auto), which needs a GPU; on a CPU set "
                "TRITON_INTERPRET=1 and torch_dtype: float32"
            )
        name = "triton" if options.kernels == AUTO else options.kernels
        workspace = options.workspace_bytes
        sizes = kernel_sizes(config)
        error = None
        if on_gpu:
            subject = certificate.Subject.of(name, sizes, dtype=dtype, workspace_bytes=workspace)
            with Console(stderr=True).status(f"Examining {name} in a process of its own"):
                found = certificate.obtain(subject, renew=True)
            differences = [Difference(**each) for each in certificate.differences(found)]
            error = found.error
        else:
            differences = list(
                verify_kernels(sizes, name, dtype=getattr(torch, dtype), workspace_bytes=workspace)
            )
    title = f"{recipe.name}: kernels: {name} against the torch path, {dtype}"
    advice = "Set context_parallel.kernels: torch."
    _report(title, differences, json_, kind="results", advice=advice)
    if error is not None:  # no difference, but the end of its process
        Console().print(f"[red]Failed:[/red] {error}. {advice}")
        raise typer.Exit(1)


def _report(
    title: str,
    differences: list[Difference],
    json_: Path | None,
    *,
    kind: str,
    advice: str,
    left_out: list[str] | None = None,
) -> None:
    """Print the largest differences, write them all, and exit with 1 if one is over its limit."""
    console, worst = Console(), sorted(differences, key=lambda d: -d.share)
    columns = {
        "tensor": lambda d: d.name,
        "difference": lambda d: f"{d.value:.1e}",
        "allowed": lambda d: f"{d.limit:.0e}",
        "": lambda d: "ok" if d.passes else "[red]differs[/red]",
    }
    shown = table(title, worst[:_SHOWN], columns)
    shown.columns[0].overflow = "fold"
    emit([d.__dict__ | {"passes": d.passes} for d in differences], json_, shown)
    if left_out:
        line = f"Left out of the comparison: {', '.join(left_out)}."
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    failed = [d for d in worst if not d.passes]
    if failed:
        console.print(
            f"[red]Differs:[/red] {len(failed)} of {len(differences)} {kind}, above all "
            f"{failed[0].name}. {advice}"
        )
        raise typer.Exit(1)
    console.print(f"[green]The same:[/green] all {len(differences)} {kind} agree.")


def _read(recipe: Path) -> tuple[dict[str, Any], dict[str, Any], int, bool]:
    """Return the recipe, its model config, the CP size and whether rows are packed."""
    if not recipe.is_file():
        raise typer.BadParameter(f"there is no file {recipe}")
    try:
        fields = yaml.safe_load(recipe.read_text())
        config = dict(fields["model"]["config"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise typer.BadParameter(
            f"{recipe} is no recipe with a model.config section ({error!r}); compose one with "
            "nemo-dsv4-cp compose"
        ) from error
    target = str(config.get("_target_", ""))
    if not any(f"Deepseek{v}ContextParallelConfig" in target for v in ("V4", "V41")):
        raise typer.BadParameter(
            f"{recipe}: model.config._target_ is {target!r}; the one changed line is "
            "_target_: nemo_dsv4_cp.DeepseekV4ContextParallelConfig.from_pretrained (of V4.1: "
            "DeepseekV41ContextParallelConfig)"
        )
    with running(f"{recipe}: "):
        config = complete_fields(config, warn)
        check_context_parallel({**fields, "model": {**fields["model"], "config": config}})
    cp_size = int((fields.get("distributed") or {}).get("cp_size") or 1)
    packed = bool((fields.get("packed_sequence") or {}).get("packed_sequence_size"))
    return fields, config, cp_size, packed

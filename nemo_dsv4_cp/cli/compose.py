# SPDX-License-Identifier: Apache-2.0
"""``compose``: a complete recipe for AutoModel's CLI from the Hydra tree, and its launch."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from nemo_dsv4_cp.cli.output import check_output
from nemo_dsv4_cp.tools import recipes
from nemo_dsv4_cp.tools.meshes import check_sizes
from nemo_dsv4_cp.tools.recipes import Recipe


def _complete_name(incomplete: str) -> list[str]:
    return [name for name in recipes.names() if name.startswith(incomplete)]


def _complete_override(incomplete: str) -> list[str]:
    known = (f"{group}={name}" for group, names in recipes.choices().items() for name in names)
    return [override for override in known if override.startswith(incomplete)]


def compose(
    name: Annotated[
        str, typer.Argument(help="The recipe to compose.", autocompletion=_complete_name)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Hydra overrides.", autocompletion=_complete_override),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write here instead of printing.")
    ] = None,
    launch: Annotated[
        bool, typer.Option("--launch", help="Run the recipe on this machine.")
    ] = False,
) -> None:
    """Compose a complete AutoModel recipe and write it, every value resolved.

    Example: nemo-dsv4-cp compose flash_sft_128k data=packed distributed.cp_size=16 -o recipe.yaml

    Exit status: that of the launched training with --launch; 2 for a mistake in the arguments.
    """
    try:
        recipe = recipes.compose(name, overrides or [])
        recipes.check_context_parallel(recipe.fields)
        check_sizes(recipe.fields, recipe.world_size)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        known = name in recipes.names()
        message = f"{name!r} is none of the recipes {', '.join(recipes.names())}"
        raise typer.BadParameter(str(error).strip() if known else message) from error
    if launch and output is None:
        raise typer.BadParameter("--launch runs a file; name one with --output recipe.yaml")
    if launch and recipe.nodes > 1:
        raise typer.BadParameter(
            f"--launch runs on this machine, and {name} is made for {recipe.nodes}; the recipe's "
            "first lines show how to launch it"
        )
    if output is not None:
        check_output("--output", output)
    text = recipe_text(recipe, [name, *(overrides or [])], output or Path("recipe.yaml"))
    if output is None:
        typer.echo(text, nl=False)
        return
    output.write_text(text)
    typer.echo(f"Wrote {output}. Launch: {launch_command(recipe, output)}", err=True)
    if launch:
        command = shlex.split(launch_command(recipe, output))
        if command[0] == "torchrun":
            command[:1] = [sys.executable, "-m", "torch.distributed.run"]
        raise typer.Exit(subprocess.run(command, check=False).returncode)


def launch_command(recipe: Recipe, path: Path) -> str:
    """Return the shell command that runs a recipe on one machine."""
    processes = recipe.processes_per_node
    if recipe.on_cpu:  # AutoModel's own launcher counts GPUs
        return (
            f"torchrun --standalone --nproc-per-node {processes} -m nemo_automodel.cli.app {path}"
        )
    return f"automodel {path} --nproc-per-node {processes}"


def recipe_text(recipe: Recipe, arguments: list[str], path: Path) -> str:
    """Return the YAML of a recipe, with comments on where it is from and how to launch it."""
    lines = [f"nemo-dsv4-cp compose {shlex.join(arguments)}"]
    if recipe.nodes == 1:
        lines.append(f"Launch: {launch_command(recipe, path)}")
    else:
        nodes, processes = recipe.nodes, recipe.processes_per_node
        lines += [
            f"Launch on {nodes} nodes of {processes} GPUs:",
            f"  Slurm:    sbatch --nodes={nodes} --gpus-per-node={processes} slurm.sub",
            f"            (AutoModel's, its command being: {launch_command(recipe, path)})",
            f"  SkyPilot: add a skypilot: section with num_nodes: {nodes}, and: automodel {path}",
        ]
    header = "".join(f"# {line}\n" for line in lines)
    fields = yaml.dump(
        recipe.fields, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=100
    )
    return f"{header}\n{fields}"


class _RecipeDumper(yaml.SafeDumper):
    """Writes lists on a line and long texts as blocks, as people write recipes."""

    def _list(self, value: list[object]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)

    def _text(self, value: str) -> yaml.Node:
        style = "|" if "\n" in value else None
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_RecipeDumper.add_representer(list, _RecipeDumper._list)
_RecipeDumper.add_representer(str, _RecipeDumper._text)

import json

import pytest
from typer.testing import CliRunner

from nemo_dsv4_cp.cli.app import app

SMALL = ["--seq-len", "2048", "--cp-size", "2", "--ratio", "0"]


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_bytes_compares_the_host_and_every_transport():
    done = run("bytes", *SMALL, "--json", "-")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout[done.stdout.index("[") :])
    paths = {figure["case"]["path"]: figure for figure in figures}
    assert set(paths) == {"host", "all_gather", "boundary"}
    received = "forward_bytes_per_token_and_remote_rank"
    assert paths["host"][received] == 1024
    assert paths["boundary"][received] == pytest.approx(127 * 1024 / 1024)


def test_memory_names_the_largest_tensors_and_draws(tmp_path):
    plot, figures = tmp_path / "out.png", tmp_path / "figures.json"
    arguments = ["--seq-len", "512", *SMALL[2:], "--json", str(figures), "--plot", str(plot)]
    done = run("memory", *arguments)
    assert done.exit_code == 0, done.output
    assert "largest tensors" in done.output
    assert plot.stat().st_size > 10_000
    assert all(len(figure["largest"]) == 5 for figure in json.loads(figures.read_text()))


def peak_with(workspace_mib):
    done = run("memory", *SMALL, "--workspace-mib", str(workspace_mib), "--json", "-")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout[done.stdout.index("[") :])
    return {figure["case"]["path"]: figure["peak_bytes"] for figure in figures}


def test_memory_goes_by_the_workspace():
    small, large = peak_with(16), peak_with(128)
    assert small["host"] == large["host"]
    assert small["boundary"] < large["boundary"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-len", "1000", "--cp-size", "3"], "use 1152"),
        (["--ratio", "8"], "none of V4's"),
        (["--json", "no-such-directory/figures.json"], "cannot be written"),
        (["--plot", "."], "cannot be written"),
    ],
)
def test_a_mistake_ends_with_a_line_that_says_what_works(arguments, message):
    done = run("bytes", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output


def test_launches_counts_what_kernels_tell():
    done = run("launches", *SMALL, "--kernels", "triton", "--json", "-")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout[done.stdout.index("[") :])
    paths = {figure["case"]["path"]: figure for figure in figures}
    assert set(paths) == {"host", "all_gather", "boundary"}
    ours, hosts = paths["boundary"]["forward"], paths["host"]["forward"]
    assert 0 < ours["count"] < hosts["count"]
    assert 0 < ours["read_bytes"] + ours["written_bytes"] < hosts["read_bytes"]


def test_kernels_prints_what_their_binaries_take(tmp_path):
    figures = tmp_path / "figures.json"
    done = run("kernels", "--model", "v4_flash", "--arch", "90", "--json", str(figures))
    assert done.exit_code == 0, done.output
    rows = json.loads(figures.read_text())
    names = ["kernel", "model", "arch", "registers", "stack", "shared", "tensor_core"]
    assert all(list(row) == names for row in rows)
    found = {row["kernel"]: row["tensor_core"] for row in rows}
    assert found["forward_kernel"] == "wgmma"
    assert found["top_k_kernel"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launches", *SMALL, "--kernels", "fastest"], "not installed"),
        (["kernels", "--arch", "70"], "none of 80, 90, 100"),
        (["operations", *SMALL], "needs a CUDA device"),
        (["kernels", "--model", "v3"], "none of v4_flash, v4_pro"),
    ],
)
def test_kernels_that_nobody_has_are_named(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize(
    "command", ["bytes", "memory", "time", "launches", "kernels", "operations"]
)
def test_every_command_shows_an_example(command):
    assert f"nemo_dsv4_cp bench {command}" in run(command, "--help").output

"""Test that the plugin sends calls for a GPU to the CPU, leaves a real GPU alone, and lets upstream's tests
catch a wrong kernel.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WRONG = """
from flash_attn import extension
from flash_attn.nosoftmax.backends import cpu, linear

def off(module, name):
    right = getattr(module, name)

    def run(*args):
        out, *rest = right(*args)
        return (out * 1.05, *rest) if module is extension else right(*args)._replace(out=out * 1.05)

    setattr(module, name, run)

off(extension, "fwd")
off(cpu, "forward")
off(linear, "forward")
"""


@pytest.fixture
def plugin():
    spec = importlib.util.spec_from_file_location("cpu_as_cuda", HERE / "cpu_as_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_way_to_name_the_device_leads_to_the_cpu(plugin):
    with plugin.CpuAsCuda():
        x = torch.randn(2, 3, device="cuda", dtype=torch.float16)
        made = [
            x,
            x.to("cuda"),
            x.cuda(),
            x.to(torch.device("cuda", 0)),
            x.to(device="cuda:0"),
            torch.zeros_like(x, device="cuda"),
            torch.arange(3, device=torch.device("cuda")),
            torch.tensor([1], device="cuda"),
            torch.randint(0, 2, (2,), device="cuda"),
        ]
    assert {t.device.type for t in made} == {"cpu"}
    with plugin.CpuAsCuda():
        assert x.to("cuda", torch.float32).dtype == torch.float32


def test_nothing_changes_on_a_machine_with_a_gpu(plugin, monkeypatch):
    monkeypatch.setattr(plugin, "on_gpu", lambda: True)
    before = torch.cuda.get_device_capability, torch.cuda.synchronize
    plugin.activate()
    assert (torch.cuda.get_device_capability, torch.cuda.synchronize) == before
    assert not torch.overrides._get_current_function_mode()


def test_processes_take_the_gpus_in_turn(plugin):
    assert [plugin.device_of(f"gw{i}", 2) for i in range(5)] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    "plugins, outcome", [((), "passed"), (("wrong",), "failed")], ids=["as it is", "off by 5 %"]
)
def test_upstreams_tests_catch_a_wrong_forward(tmp_path, plugins, outcome):
    from fapatch.base.project import Project

    test_file = Project.open().source / "tests" / "test_flash_attn.py"
    (tmp_path / "wrong.py").write_text(WRONG)
    # dtype, causal, head_dim, seqlen, use_softmax in the order of the file's decorators: the first value of
    # each but the last
    described = _python(tmp_path, HERE / "axes.py", test_file)
    axes = json.loads(described.stdout)["functions"]["test_flash_attn_bwd_overflow"]
    switch = next(i for i, axis in enumerate(axes) if axis["names"] == ["use_softmax"])
    seqlen = next(i for i, axis in enumerate(axes) if axis["names"] == ["seqlen"])
    first = [axis["labels"].index("17") if i == seqlen else 0 for i, axis in enumerate(axes)]
    second = [1 if i == switch else index for i, index in enumerate(first)]
    (tmp_path / "plan.json").write_text(json.dumps({"test_flash_attn_bwd_overflow": [first, second]}))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    extra = [option for name in plugins for option in ("-p", name)]
    done = _python(
        tmp_path,
        "-m",
        "pytest",
        "-q",
        "-c",
        "pytest.ini",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-p",
        "cpu_as_cuda",
        "-p",
        "pick",
        *extra,
        "--pick",
        "plan.json",
        "--journal",
        "journal.jsonl",
        test_file,
    )
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == [outcome] * 2, done.stdout


def _python(folder: Path, *argv: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(HERE), str(folder), os.environ.get("PYTHONPATH", "")]))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=folder,
        env={**env, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )

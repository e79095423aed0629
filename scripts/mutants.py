"""Small faults planted one at a time: does a test notice?

    python scripts/mutants.py [--per-file 20] [--only updates] [--seed 0] [--jobs 2]

A fault (mutant) is one change of one place of a file in SOURCES, see mutations.py. First the tests
run once as they are, and coverage tells which lines each of them reaches. Then every mutant is
tried in a process of its own, forked from this one with torch imported already, by the tests that
reach its line, the quickest first; the first that fails notices it. Prints a table and the mutants
that nothing noticed; exit code 1 when less than 85 % were noticed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import coverage
import pytest
from mutations import ROOT, Mutant, mutants

HERE = "tests/converters"
ADAPTERS = f"{HERE}/lora_folder {HERE}/targets {HERE}/test_targets.py"
MERGES = f"{HERE}/merged {HERE}/test_companions.py {HERE}/test_nothing_lost.py"
CACHE = "tests/dora_serve/test_cache.py tests/dora_serve/test_identity.py"
NAMES = " ".join(f"{HERE}/test_{n}.py" for n in ("base", "families", "naming", "tasks", "ties"))
UPDATES = " ".join(
    f"{HERE}/test_{n}.py" for n in ("updates_exact", "update", "memo", "peft_layer", "peft_layers")
)
GGUF = f"{HERE}/test_gguf.py {HERE}/test_gguf_scales.py"
QUANTIZED = " ".join(
    f"{HERE}/merged/test_quantized_{n}.py" for n in ("bnb", "compressed", "fp8", "ints", "mxfp4")
)
GUARD = "tests/server/test_guard.py tests/server/test_guard_exact.py"
DRAWING = " ".join(f"tests/engines/test_{n}.py" for n in ("sampling", "generation", "shaping"))
FOLDER = " ".join(
    f"tests/dora_serve/test_{n}.py"
    for n in ("names", "discover", "other_bases", "neighbours", "cache", "identity")
)
QUANTIZED_BASE = "tests/dora_serve/test_quantized_base.py"
READERS = " ".join(
    f"{HERE}/test_{n}.py"
    for n in (
        *("adalora", "bad_input", "bayesian", "gated", "kohya", "litgpt", "magnitude", "mlx_lm"),
        *("mora", "other_ranks", "parts", "peft_kinds", "peft_lora", "peft_tuners", "promises"),
        *("promises_names", "reference_runs", "ties", "torchtune", "trainer_folders"),
        *("families", "experts_apart", "reader_options"),
    )
)
BAD_INPUT = f"{HERE}/test_pickles.py {HERE}/test_bad_input.py {HERE}/test_tensors.py"
# What is mutated → the tests that should notice.
SOURCES = {
    "converters/updates/*.py": UPDATES,
    "converters/files/*.py": f"{HERE}/files {BAD_INPUT} {CACHE}",
    "converters/model/*.py": f"{HERE}/model {HERE}/merged {HERE}/lora_folder {NAMES}",
    "converters/model/quantized/*.py": f"{QUANTIZED} {QUANTIZED_BASE}",
    "converters/readers/*.py": READERS,
    "converters/targets/*.py": f"{ADAPTERS} tests/dora_serve/test_verify.py {QUANTIZED_BASE}",
    "converters/targets/gguf/*.py": f"{GGUF} {HERE}/targets/test_target.py",
    "converters/targets/merged/*.py": f"{MERGES} {HERE}/targets/test_target.py {HERE}/test_base.py",
    "converters/targets/lora_folder/*.py": ADAPTERS,
    "dora_serve/folder/*.py": f"{FOLDER} {QUANTIZED_BASE}",
    "dora_serve/server/guard.py": GUARD,
    "dora_serve/onnxruntime/sampling.py": DRAWING,
    "dora_serve/onnxruntime/generation.py": DRAWING,
    "dora_serve/onnxruntime/shaping.py": DRAWING,
    "dora_serve/onnxruntime/adapter_pool.py": "tests/engines/test_adapter_pool.py",
}
# Every file of these is in SOURCES, but for those of ONNX graphs.
ROOMS = ("updates", "files", "model", "readers", "targets")
LEAST = 85  # percent
# Imported before the fork, so that no mutant pays for it.
PRELOAD = (
    "_pytest.assertion.rewrite click.testing encodings.idna gguf httpx hypothesis onnxruntime peft "
    "safetensors.torch starlette.testclient transformers.models.gpt2.modeling_gpt2 "
    "transformers.models.llama.modeling_llama transformers.models.roberta.modeling_roberta"
).split()
SECONDS = 20.0  # of tests that a mutant is tried by at most; those that reach its line
# All tests, without what only serves a reader of failures, and without other packages' plugins.
QUICK = ["-m", "", "-x", "--tb=line", "--assert=plain"]
QUICK += ["-p", "no:cacheprovider", "-p", "no:faulthandler"]
# A file of terabytes of holes is more than a mutant may write.
HOLES = f"--deselect={HERE}/test_pickles.py::test_what_lies_behind"
MEMORY, DISK = 6 << 30, 1 << 30  # bytes that a mutant may take

Tests = dict[str, tuple[float, dict[str, list[int]]]]  # name → seconds, and the lines of each file


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the module of a mutant from the mutant's source."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant
        self._name = mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if name != self._name:
            return None
        package = self._mutant.file.endswith("__init__.py")
        return importlib.util.spec_from_loader(name, self, is_package=package)

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = str(ROOT / self._mutant.file)
        exec(compile(self._mutant.source, module.__file__, "exec"), module.__dict__)


class Selected:
    """Leaves the tests named, in their order."""

    def __init__(self, names: Sequence[str]) -> None:
        self._order = {name: number for number, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._order),
            key=lambda item: self._order[item.nodeid],
        )


class Traced:
    """Measures how long each test takes and which lines of `files` it reaches."""

    def __init__(self, files: Sequence[str], report: Path) -> None:
        self._files, self._report = files, report
        self._seconds: dict[str, float] = {}
        include = [str(ROOT / file) for file in files]
        self._coverage = coverage.Coverage(data_file=None, config_file=False, include=include)
        self._coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._coverage.switch_context(item.nodeid)
        begin = time.process_time()
        result = yield
        self._seconds[item.nodeid] = time.process_time() - begin
        return result

    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        data = self._coverage.get_data()
        tests: Tests = {name: (seconds, {}) for name, seconds in self._seconds.items()}
        for file in self._files:
            for line, names in data.contexts_by_lineno(str(ROOT / file)).items():
                for name in filter(None, names):
                    tests[name][1].setdefault(file, []).append(line)
        self._report.write_text(json.dumps(tests))


def run_pytest(
    work: Path, tests: Sequence[str], plugins: Callable[[], list[object]], seconds: float
) -> int:
    """Fork a process that runs pytest with its last word as exit status; returns its id. It ends
    after `seconds`, whatever it does."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    signal.alarm(int(seconds) + 1)  # its default action needs no Python to run
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK,) * 2)
    out = os.open(work / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    code = 70
    with contextlib.suppress(BaseException):
        options = [*QUICK, HOLES, f"--basetemp={work / 'tests'}", *tests]
        code = int(pytest.main(options, plugins=plugins()))
        sys.stdout.flush()
    os._exit(code)


def ended(child: int) -> tuple[int, int]:
    """Wait for a child, or any (-1): its id, and 0 where all its tests passed."""
    found, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(found, signal.SIGKILL)  # what it may have started
    return found, status


def trace(work: Path, files: Sequence[str], tests: Sequence[str]) -> Tests:
    """Run the tests as they are; raises `SystemExit` where one fails."""
    work.mkdir()
    report = work / "report.json"
    child = run_pytest(work, tests, lambda: [Traced(files, report)], 3600)
    if ended(child)[1] or not report.exists():
        raise SystemExit("without a mutant, the tests fail:\n" + (work / "output").read_text())
    found: Tests = json.loads(report.read_text())
    return found


def reaching(mutant: Mutant, tests: Tests) -> tuple[list[str], float]:
    """The tests that reach a mutant, the quickest first, and the seconds that they take.

    What stands outside of functions runs when a module is imported, so any test may show it: first
    those that run anything of the file.
    """

    def rank(name: str) -> tuple[bool, float]:
        seconds, lines = tests[name]
        reached = set(lines.get(mutant.file, []))
        return not (reached if mutant.lines is None else reached & set(mutant.lines)), seconds

    names, total = [], 0.0
    for name in sorted(tests, key=rank):
        missed, seconds = rank(name)
        if total > SECONDS or (missed and mutant.lines is not None):
            break
        names.append(name)
        total += seconds
    return names, total


def survivors(work: Path, planted: Sequence[tuple[Mutant, Tests]], jobs: int) -> list[Mutant]:
    """The mutants that no test notices."""
    running: dict[int, tuple[Mutant, Path]] = {}
    alive = []

    def collect() -> None:
        child, status = ended(-1)
        mutant, folder = running.pop(child)
        shutil.rmtree(folder, ignore_errors=True)
        if not status:
            alive.append(mutant)
            print(f"  {mutant.file}:{mutant.line}: {mutant.before}  →  {mutant.after}", flush=True)

    for number, (mutant, tests) in enumerate(planted):
        names, seconds = reaching(mutant, tests)
        if not names:
            alive.append(mutant)
            print(f"  {mutant.file}:{mutant.line}: no test runs {mutant.before}", flush=True)
            continue
        if len(running) == jobs:
            collect()
        folder = work / str(number)
        folder.mkdir()
        files = list(dict.fromkeys(name.split("::")[0] for name in names))

        def plugins(mutant: Mutant = mutant, names: list[str] = names) -> list[object]:
            sys.meta_path.insert(0, Mutated(mutant))
            return [Selected(names)]

        child = run_pytest(folder, files, plugins, 60 + 10 * seconds)
        running[child] = mutant, folder
    while running:
        collect()
    return alive


def table(rows: dict[str, tuple[int, int, int]]) -> str:
    """Markdown of file → (mutants there are, tried, noticed)."""
    lines = ["| file | mutants | tried | noticed | share |", "|---|---:|---:|---:|---:|"]
    total = tuple(sum(row[n] for row in rows.values()) for n in range(3))
    for file, (found, tried, noticed) in {**rows, "all": total}.items():
        lines.append(f"| {file} | {found} | {tried} | {noticed} | {noticed / tried:.0%} |")
    return "\n".join(lines)


def sources(only: str) -> dict[str, list[str]]:
    """Tests → the files that they should notice a mutant of, whose path holds `only`."""
    found: dict[str, list[str]] = {}
    for source, tests in SOURCES.items():
        paths = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(source))
        assert paths, f"no file is {source}"
        found.setdefault(tests, []).extend(paths)
    covered = {file for files in found.values() for file in files}
    for path in (path for room in ROOMS for path in (ROOT / "converters" / room).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        assert file in covered or "targets/onnx" in file, f"{file} is not in SOURCES"
    return {
        tests: chosen
        for tests, files in found.items()
        if (chosen := [f for f in files if only in f])
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--per-file", type=int, default=20)
    parser.add_argument("--only", default="", help="files whose path holds this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import torch
    from hypothesis import Phase, settings

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile("mutants", phases=phases, database=None, deadline=None)
    settings.load_profile("mutants")
    torch.set_num_threads(1)  # threads do not outlive a fork
    for name in PRELOAD:
        import_module(name)
    totals: dict[str, int] = {}
    planted: list[tuple[Mutant, Tests]] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        work = Path(folder)
        for number, (names, files) in enumerate(sources(options.only).items()):
            traced = trace(work / f"traced{number}", files, names.split())
            for file in files:
                choose = random.Random(f"{options.seed} {file}")
                totals[file], chosen = mutants(file, choose, options.per_file)
                planted += [(mutant, traced) for mutant in chosen]
        alive = survivors(work, planted, options.jobs)
    tried = {file: sum(m.file == file for m, _ in planted) for file in totals}
    lost = {file: sum(m.file == file for m in alive) for file in totals}
    print(table({f: (totals[f], n, n - lost[f]) for f, n in tried.items() if n}))
    return int(100 * (len(planted) - len(alive)) < LEAST * len(planted))


if __name__ == "__main__":
    raise SystemExit(main())

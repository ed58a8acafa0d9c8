"""A device that times the candidates and artifacts of a build instead of the build host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgepack.benchmark.bench import Latency, Ratio
from edgepack.benchmark.devices.bench import bench_on
from edgepack.benchmark.devices.bundle import Job
from edgepack.config.target import Runtime
from edgepack.ir.arrays import Feeds
from edgepack.results import DeviceRun

ROUNDS = 25


@dataclass(frozen=True, slots=True)
class DeviceTiming:
    """The device's address, and its Python."""

    address: str
    python: str = "python3"

    def ratios(self, models: Sequence[Path], runtime: Runtime, feeds: Sequence[Feeds]) -> list[Ratio]:
        """Speed of ``models`` relative to the first, from one interleaved run.

        Raises:
            ModelError, DeviceError: see :func:`edgepack.benchmark.devices.bench.bench_on`.
        """
        job = Job(runs=ROUNDS, cold=False)
        run = bench_on(self.address, models, runtime, feeds, job, python=self.python)
        return [Ratio(m.speedup, m.speedup_error) for m in run.models]

    def latencies(
        self, models: Mapping[str, Path], runtime: Runtime, feeds: Sequence[Feeds], runs: int
    ) -> tuple[dict[str, Latency], DeviceRun]:
        """Latency by name, and the device's run for the report.

        Raises:
            ModelError, DeviceError: see :func:`edgepack.benchmark.devices.bench.bench_on`.
        """
        run = bench_on(
            self.address, list(models.values()), runtime, feeds, Job(runs=runs), python=self.python
        )
        found = {
            name: Latency(
                m.p50_ms, m.p90_ms, m.min_ms, m.mean_ms, runs, m.speedup, m.speedup_error,
                m.cold_start_ms, m.peak_memory_bytes,
            )
            for name, m in zip(models, run.models, strict=True)
        }  # fmt: skip
        named = [replace(m, model=name) for name, m in zip(models, run.models, strict=True)]
        return found, replace(run, models=tuple(named))

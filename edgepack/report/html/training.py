"""The section of the HTML report with training curves."""

from collections.abc import Sequence

from edgepack.report.html.charts import Line, lines
from edgepack.report.html.markup import Html, tag
from edgepack.report.html.words import Section, section
from edgepack.results import BuildReport, Curve


def training(report: BuildReport) -> Section | None:
    """The loss curves of each training; ``None`` where nothing was trained."""
    drawn = (_chart(stage.name, stage.curve) for stage in report.stages if stage.curve is not None)
    charts = [chart for chart in drawn if chart is not None]
    if not charts:
        return None
    return section(
        "training",
        "Training",
        tag("div", charts, class_="grid-2"),
        lead="The loss on training samples and on validation samples.",
    )


def _chart(name: str, curve: Curve) -> Html | None:
    drawn = [
        Line("training", *_positive(curve.steps, curve.losses), "solid"),
        Line("validation", *_positive(curve.judged_steps, curve.judged_losses), "dashed"),
    ]
    shown = [line for line in drawn if line.x]
    if not shown:
        return None
    return lines(f"Loss of {name}", shown, f"step; the weights of step {curve.kept_step} were kept", "loss")


def _positive(steps: Sequence[int], losses: Sequence[float]) -> tuple[list[float], list[float]]:
    """The points with a positive loss, for a logarithmic axis."""
    shown = [(float(step), loss) for step, loss in zip(steps, losses, strict=True) if loss > 0]
    return [step for step, _ in shown], [loss for _, loss in shown]

"""Where records can go: subscribers for :meth:`esper_fx.telemetry.Watch.subscribe`."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from esper_fx.checks import cause, path_of, shown
from esper_fx.errors import TelemetryError
from esper_fx.state_fields import MEASURED
from esper_fx.telemetry.records import SiteRecord


class JsonLines:
    """Appends records to a file, one line of JSON each; what was not measured is null.

    Args:
        path: The file; its folder must be there.

    Raises:
        TelemetryError: It cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path_of(path, "path", TelemetryError)
        try:
            self.path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise TelemetryError(f"records cannot be written to {shown(str(path))}: {cause(error)}") from error

    def __call__(self, records: list[SiteRecord]) -> None:
        lines = [json.dumps({k: _finite(v) for k, v in record.to_dict().items()}) for record in records]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))


class TensorBoard:
    """Writes what was measured at every site as scalars called ``esper/SITE/FIELD``, by the clock of the measured step.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar(tag, value, step)``.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __call__(self, records: list[SiteRecord]) -> None:
        for record in records:
            for field in ("alpha", *MEASURED):
                value = getattr(record, field)
                if record.samples and math.isfinite(value):
                    self.writer.add_scalar(f"esper/{record.site}/{field}", value, record.sampled_at)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

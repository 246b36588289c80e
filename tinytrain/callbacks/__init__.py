"""What you see of a training run, and how you stop it.

The Trainer calls a callback at every event of the run. Small ones share the work, and each file
here works in a plain ``transformers.Trainer`` too:

- ``history``: `VerboseTrainingCallback` writes messages, `HistoryCallback` ``history.jsonl``;
- ``plot``: `LivePlotCallback` draws while the model trains; `replay` and `plot_runs` draw later;
- ``samples``: `SampleCallback` lets the model write;
- ``stop``: `StopCallback` ends the run in good order when you ask for it;
- ``clock``: `TimeLimit` ends the run when its time is up;
- ``cores``: `ShareCores` leaves busy cores to others;
- ``guard``: `LossGuard` stops a run whose loss spikes or is NaN.
"""

from tinytrain.callbacks.clock import TimeLimit
from tinytrain.callbacks.cores import ShareCores
from tinytrain.callbacks.guard import LossError, LossGuard
from tinytrain.callbacks.history import HistoryCallback, VerboseTrainingCallback
from tinytrain.callbacks.plot import LivePlotCallback, is_this_normal, plot_runs, replay
from tinytrain.callbacks.samples import SampleCallback
from tinytrain.callbacks.stop import StopCallback
from tinytrain.common import read_history

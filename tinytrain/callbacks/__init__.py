"""What you see of a training run, and how you stop it.

The Trainer calls a callback at every event of the run. Each file here works in a plain
``transformers.Trainer`` too.
"""

from tinytrain.callbacks.clock import TimeLimit
from tinytrain.callbacks.cores import ShareCores
from tinytrain.callbacks.guard import LossError, LossGuard
from tinytrain.callbacks.history import HistoryCallback, VerboseTrainingCallback
from tinytrain.callbacks.plot import LivePlotCallback, is_this_normal, plot_runs, replay
from tinytrain.callbacks.samples import SampleCallback
from tinytrain.callbacks.stop import StopCallback
from tinytrain.common import read_history

"""Train a Chinese language model from scratch, on the machine you have.

Each module holds the helpers of one notebook and can be copied on its own:

====================  =============================  ==============================
notebook              module                         what it is about
====================  =============================  ==============================
01_gpu_check          ``tinytrain.hardware``         this machine, and its precision
02_data_split         ``tinytrain.corpus``           load, validate, split the text
03_tokenization       ``tinytrain.tokenization``     tokenizers, chunks and packing
04_model_config       ``tinytrain.modeling``         configuration and exact counts
05_train_bf16         ``tinytrain.training``         the Trainer, watched while it runs
06_evaluate           ``tinytrain.evaluation``       measure a model, let it write
07_scale_out          ``tinytrain.__main__``         the same from a shell, in many processes
====================  =============================  ==============================

Notebook 02 also uses ``tinytrain.duplicates`` (held-out documents that were seen in training),
notebook 05 ``tinytrain.callbacks`` (what one sees, and how one stops it) and
``tinytrain.loss`` (a large vocabulary in little memory), notebook 06 ``tinytrain.export``.
``tinytrain.recipes`` holds every number of a run. ``tinytrain.steps`` joins the modules: one
function a step, which keeps its result on disk. ``tinytrain.widgets`` lays sliders over some of
their functions.

Importing ``tinytrain`` imports none of them, nor torch.
"""

__version__ = "0.1.0"

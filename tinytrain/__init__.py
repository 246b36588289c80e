"""Train a Chinese language model from scratch, on the machine you have.

Each notebook has its modules, whose functions you can copy into a project of your own:

====================  ==========================================  ================================
notebook              its modules                                 what they are about
====================  ==========================================  ================================
01_gpu_check          ``hardware``                                this machine, and its precision
02_data_split         ``corpus``, ``duplicates``                  load, validate, split the text
03_tokenization       ``tokenization``, ``qwen``                  tokenizers, chunks and packing
04_model_config       ``modeling``, ``costs``                     configuration and exact counts
05_train_bf16         ``training``, ``checkpoints``, ``callbacks``  the Trainer, watched and resumed
06_evaluate           ``evaluation``, ``generation``              measure a model, let it write
07_look_inside        ``inside``, ``pictures``                    the model written out and drawn
08_chat               ``conversations``, ``chat``, ``tuning``     from completing to answering
09_scale_out          ``planning``, ``__main__``                  the time you have, from a shell
10_experiments        ``runs``                                    short runs that answer questions
====================  ==========================================  ================================

Behind them: ``encyclopedia`` (the built-in text), ``hub`` (downloads and uploads), ``loss`` and
``optimizer`` (speed and memory), ``export`` and ``gguf_file`` (a model for others). ``recipes``
holds every hyperparameter of a run, ``common`` what several modules share. ``steps`` keeps the
results of the first notebooks on disk, ``runs`` puts a training together, ``results`` is what it
leaves, and ``widgets`` lays sliders over some functions.

Importing ``tinytrain`` imports none of them, nor torch.
"""

__version__ = "0.1.0"

"""What every run needs around its model; the same in every data set folder.

run.py the run; config.py keys, ymls, flags; build.py from a checkpoint to a model and its accuracy;
checkpoint.py files of weights; folder.py a run's folder; batches.py loaders and splits; meters.py
losses, metrics, progress; process.py ranks and signals; graph.py CUDA graphs; hub.py several
folders in one process; log.py lines and errors. It sets what torch reads from the environment, so
a script imports it first.
"""

import os

try:
    import fcntl as fcntl
except ImportError:
    raise SystemExit("error: Linux or macOS is needed; on Windows take WSL") from None

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin are slow on a busy machine
os.environ.setdefault("USER", str(os.getuid()))  # PyTorch asks for a name, which not all users have

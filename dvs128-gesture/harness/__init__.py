"""What every run needs around its model; the same in every data set folder.

A script imports it before torch, since it sets what torch reads from the environment.
"""

import os

try:
    import fcntl as fcntl
except ImportError:
    raise SystemExit("error: Linux or macOS is needed; on Windows take WSL") from None

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin are slow on a busy machine
os.environ.setdefault("USER", str(os.getuid()))  # PyTorch asks for a name, which not all users have

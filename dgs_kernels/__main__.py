"""`python -m dgs_kernels` prints which backend serves what, and why."""

from dgs_kernels import explain

if __name__ == "__main__":
    print(explain())

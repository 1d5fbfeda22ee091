import sys

if sys.argv[:1] == ["-m"]:  # `python -m pipeline.…` is on its way, before its slow imports
    from pipeline import interrupt

    interrupt.leave_at_once()
    interrupt.leave_with_dvc()

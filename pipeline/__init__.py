import sys

if sys.argv[:1] == ["-m"]:  # `python -m pipeline.…` is on its way, before its slow imports
    from pipeline.stage import interpreter

    interpreter.use_the_projects_own()
    from pipeline.stage import interrupt

    interrupt.leave_at_once()
    interrupt.leave_with_dvc()

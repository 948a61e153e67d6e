"""The command `yolov9-fast`: one file per sub-command, each with `configure(parser)` and `run(arguments)`."""

"""Fuzz targets: functions that draw hostile input and must neither crash nor hang. See `frame.py`."""

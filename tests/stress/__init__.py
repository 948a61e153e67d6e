"""Long tests of a process as a whole: kills at random moments, memory over many epochs and images."""

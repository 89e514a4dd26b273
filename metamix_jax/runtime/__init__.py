"""Processes, devices, signals, memory and progress: what a program runs on."""

"""The runtime environment: processes, devices, memory, signals and progress output."""

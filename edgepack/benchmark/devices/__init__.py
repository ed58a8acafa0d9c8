"""Benchmarks on a device by ssh, adb, docker or on this host: one bundle is sent, run and removed."""

"""The peak memory of a process, for the benchmarks beside this file."""


def peak_memory():
    "Tell the most memory that this process has held, in bytes (`ru_maxrss` would count what its parent held, too)."
    with open("/proc/self/status", encoding="utf-8") as file:
        return 1024 * int(file.read().split("VmHWM:")[1].split()[0])

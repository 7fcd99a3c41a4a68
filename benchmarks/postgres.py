"""A PostgreSQL of our own for the one scenario that writes to it; $BENCH_POSTGRES_URL names another."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from machine import CLIENT, Missing, Process, free_port, wait_for_port


class Postgres:
    def __init__(self) -> None:
        self.process, self.url = None, os.environ.get("BENCH_POSTGRES_URL", "")
        if self.url:
            return
        path = os.pathsep.join([os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])
        initdb, postgres = shutil.which("initdb", path=path), shutil.which("postgres", path=path)
        if not initdb or not postgres:
            raise Missing("install postgresql, or set BENCH_POSTGRES_URL")
        self.folder = tempfile.TemporaryDirectory(prefix="bench-pg")
        user = {}
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            user = {"user": "nobody", "group": "nogroup"}
            shutil.chown(self.folder.name, "nobody", "nogroup")
        data, port = f"{self.folder.name}/data", free_port()
        command = [initdb, "-D", data, "-U", "bench", "-A", "trust", "--no-sync"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **user)
        command = [postgres, "-D", data, "-p", port, "-h", "127.0.0.1", "-k", self.folder.name]
        self.process = Process(*command, cores=CLIENT, log="postgres", cwd="/", **user)
        wait_for_port(port, self.process)
        self.url = f"postgresql://bench@127.0.0.1:{port}/postgres"

    def stop(self) -> None:
        if self.process:
            self.process.stop()
            self.folder.cleanup()

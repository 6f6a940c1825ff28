"""The command line: `lora-squeeze`."""

from lora_squeeze.cli.app import main as main

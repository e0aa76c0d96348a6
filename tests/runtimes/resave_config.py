"""Writes an adapter's config as the installed PEFT does, with the keys that it knows: resave_config.py ADAPTER"""

import json
import sys
from pathlib import Path

from peft import LoraConfig

folder = Path(sys.argv[1])
settings = json.loads((folder / "adapter_config.json").read_text())
LoraConfig(**{k: v for k, v in settings.items() if k in LoraConfig.__dataclass_fields__}).save_pretrained(folder)

"""Turn workflows in the interface's form into prompts: run by comfy-cli's Python, which has the converter.

`convert_templates.py NODES FOLDER RESULT`: what `/object_info` says of the nodes, a folder of templates, the file to
write, which holds a prompt per name of a template.
"""

import json
import sys
from pathlib import Path

from comfy_cli.workflow_to_api import convert_ui_to_api  # pyright: ignore


def main() -> None:
    nodes, folder, result = map(Path, sys.argv[1:])
    info, prompts = json.loads(nodes.read_text(encoding="utf-8")), {}
    for path in sorted(folder.glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        if "nodes" in workflow:  # not the index and its translations
            prompts[path.stem] = convert_ui_to_api(workflow, info)
    result.write_text(json.dumps(prompts), encoding="utf-8")


if __name__ == "__main__":
    main()

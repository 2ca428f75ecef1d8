"""The models that datamodel-code-generator made, with requests: submits a prompt, waits, downloads the file."""

import json
import sys

import requests
from wangpd_models import GenerateRequest, SubmittedAnswer, TaskStateAnswer

api = f"{sys.argv[1]}/api/v1"
body = GenerateRequest(prompt=sys.argv[2]).model_dump(exclude_unset=True)
submitted = SubmittedAnswer.model_validate(requests.post(f"{api}/generate", json=body, timeout=60).json())
task_id = submitted.data.task_id
status = ""
while status not in ("completed", "failed", "cancelled"):
    answer = requests.get(f"{api}/status/{task_id}?wait=60", timeout=90)
    task = TaskStateAnswer.model_validate(answer.json()).data
    status = task.status
film = requests.get(f"{api}/download/{task.files[0].filename}", timeout=60).content
print(json.dumps({"task_id": task_id, "warnings": submitted.data.warnings, "bytes": len(film)}))

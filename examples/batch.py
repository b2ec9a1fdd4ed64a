"""Many prompts at once, each with a plan of its own: python examples/batch.py RUN OUT

RUN is made by `planlm train` (or is its model folder). OUT gets a line of JSON for each prompt, as the command's
`--prompts FILE --out OUT` writes them: the same texts whatever the batch size.
"""

import json
import sys
import tempfile
from pathlib import Path

import planlm

PROMPTS = [
    {"id": "harbour", "prompt": "The harbour was built in 1905."},
    {"id": "school", "prompt": "The school has 300 pupils.", "plan": [0, "*", 1]},  # actions of the next sentences
    {"id": "mill", "prompt": "The mill stands by the river.", "plan": "1"},
]

run, out = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "prompts.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    planlm.generate(run=run, prompts=file, out=out, batch_size=2, max_new_tokens=20)

for line in Path(out).read_text().splitlines():
    result = json.loads(line)
    followed = ", ".join(str(sentence["action"]) for sentence in result["plan"])
    print(f"{result['id']}: {result['prompt']}{result['text']}\n  actions: {followed}")

# One prompt with several plans, drawn by the planner; the text that the model finds most probable comes first.
best = planlm.generate(run=run, prompt=PROMPTS[0]["prompt"], num_plans=3, max_new_tokens=20)["candidates"]
for candidate in best:
    score = "no token" if candidate["score"] is None else f"{candidate['score']:.2f} nats a token"
    print(f"{score}: {candidate['text']}")

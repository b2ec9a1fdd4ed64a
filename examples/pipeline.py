"""A trained model in transformers' pipeline: python examples/pipeline.py RUN/model "The harbour was built in 1905." """

import sys

from transformers import pipeline

import planlm  # noqa: F401  (transformers knows the model from here on; trust_remote_code=True does the same)

model, prompt = sys.argv[1:]
generator = pipeline("text-generation", model=model)
for text in generator(prompt, max_new_tokens=20, do_sample=True, num_return_sequences=2):
    print(text["generated_text"])

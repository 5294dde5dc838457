"""What options allow, by name. Importing this loads nothing else, so that the command line stays fast."""

# see `training.methods`; "peft" trains the adapter that a model carries, which is made in Python
METHODS = ("smf", "smf-open", "lora", "peft", "full")
MEMORY_METHODS = ("smf", "smf-open")
# in comparisons: facts taught one after another, with fact rows (`Stream`)
LEARN = "learn"
# see `adapter.config.SparseMemoryConfig`
WRITES = ("last", "own")
MODES = ("additive", "replacement")
TRAINABLE = ("values", "values+scale", "memory")
# see `optim.selection` and `optim.rows`
RULES = ("kl", "tfidf", "tf", "grad", "random")
MOMENTS = ("row", "element", "table")
# by the name that transformers has for them
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
LOSS_ON = ("completion", "all")
PRECISIONS = ("float32", "bfloat16")
RETROFITS = ("calibrate", "dense")
# see `patches.algebra.merge`
CONFLICTS = ("refuse", "sum", "last")
# what each task measures
TASKS = {
    "recall": "recall",
    "triviaqa": "recall",
    "multiple-choice": "multiple-choice",
    "medmcqa": "multiple-choice",
    "perplexity": "perplexity",
    "wikitext": "perplexity",
    "mentions": "mentions",
    "contexts": "taught",
    "neighbours": "taught",
}
# what `sparsemem compare` runs
RECIPES = {
    "demo": "an invented handbook, taught by three methods: what each learns and forgets",
    "medical": "diagnoses to ICD-10 chapters: a domain instead of facts",
    "lifelong": "facts of zsRE, CounterFact or PokeMQA, taught one at a time",
    "paper": "the whole protocol of 2605.03229",
}

"""What is read: text becomes token files, token files become batches.

In the order of the data's way: :mod:`~megafp4.data.corpus` or :mod:`~megafp4.data.preprocess`
turn text into Megatron's ``.bin``/``.idx`` pairs with a tokenizer of
:mod:`~megafp4.data.tokenizer`; :mod:`~megafp4.data.indexed` reads and writes the pairs;
:mod:`~megafp4.data.gpt_dataset` cuts one pair into shuffled samples; :mod:`~megafp4.data.blend`
mixes several; :mod:`~megafp4.data.loader` makes batches of them, each a pure function of the seed
and the number of samples consumed.

Only ``loader`` needs torch, so that preprocessing workers start fast.
"""

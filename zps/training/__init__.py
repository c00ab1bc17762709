"""The rooms that know torch's modules and optimizers: what a training loop embeds."""

"""The built-in corpus: worked math word problems from templates."""

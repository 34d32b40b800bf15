"""Story problems put together from parts: a setting, an opening, two to four events and an ending that asks.

`kinds` is what can happen to a count and `frames` how that is worded; `people` and `places` are the settings, made
by `settings`; `telling` puts a story together. A new row in any of these tables is a new part of every story it suits.
"""

"""Story problems composed of parts: a setting, an opening, two to four events, and an ending with the question.

`kinds` defines what can happen to a count, `frames` how it is worded; `people` and `places` define the settings, which
`settings` builds; `telling` composes a story. A new row in any of these tables is used in every story that it fits.
"""

"""The report of a study as one HTML file. `page` puts it together, `data` says what is in it, `charts` how it is drawn.

What a reader sees comes from `template.html`, `style.css` and `page.js`, which switches plans, shapes and looks.
"""

"""The report of a study as one HTML file.

`page` puts it together, `data` chooses its content, and `charts` and `front_chart` draw it. Readers
see `template.html` and `style.css`. `page.js` switches plans, shapes and looks.
"""

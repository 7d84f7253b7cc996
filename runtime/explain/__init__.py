"""One page on which a person takes more or fewer tokens, and sees what they decode to.

- command: the command; page, with page.html, page.css and page.js: the page
- samples: which chunks of the data are shown, and which are counted
- measure: decodes them from every number of tokens; classes: what the class of a chunk says of it
"""

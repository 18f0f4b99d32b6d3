"""Reports, whatever they are about: text, JSON, pages, figures, and where a result comes from."""

"""The phases as scripts: arguments in, files and a printed summary out."""

"""One module per sub-command of ``creto``, imported when that command is used."""

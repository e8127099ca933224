"""Methods compared under equal conditions: what is measured, recorded and concluded."""
